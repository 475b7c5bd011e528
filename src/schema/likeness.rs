//! What a table lacks that is to replace another one.

use super::procedure::Procedure;
use super::replace::ReplaceTable;
use super::table::Table;
use crate::deadline::timeout_millis;
use crate::error::{Error, ErrorKind};
use crate::schema::sql::likeness::{self, Copy, Trait};

/// How many differences an error lists.
const MAX_LISTED: usize = 40;

impl ReplaceTable {
    /// Compares the tables, and copies what is to be copied before the swap. Returns the statements that belong to the
    /// swap.
    pub(super) async fn likeness(
        &self,
        procedure: &mut Procedure<'_>,
        old: &Table,
        new: &Table,
    ) -> Result<Vec<String>, Error> {
        let (of_old, of_new) = self.traits(procedure, old, new).await?;
        let missing = missing(&of_old, of_new);
        let refused: Vec<_> = missing
            .iter()
            .filter(|one| !self.like_old || one.copy.is_none())
            .copied()
            .collect();
        if !refused.is_empty() && !self.allow_differences {
            return Err(Error::config(self.refusal(old, new, &refused)));
        }
        if !self.like_old {
            return Ok(Vec::new());
        }
        let mut before = Vec::new();
        let mut validated = Vec::new();
        let mut with_swap = Vec::new();
        for one in &missing {
            match &one.copy {
                Some(Copy::Before(sql)) => before.push(sql.clone()),
                Some(Copy::Validated(add, validate)) => validated.extend([add, validate]),
                Some(Copy::WithSwap(_)) | None => {}
            }
        }
        for one in &of_old {
            // The old table's sequence may have been used since the comparison.
            if let Some(Copy::WithSwap(sql)) = &one.copy
                && (["identity", "name"].contains(&&*one.kind) || missing.contains(&one))
            {
                with_swap.push(sql.clone());
            }
        }
        if !before.is_empty() {
            procedure.unhurried_step(before.join("; ")).await?;
        }
        for sql in validated {
            procedure.unhurried_step(sql.clone()).await?;
        }
        Ok(with_swap)
    }

    async fn traits(
        &self,
        procedure: &Procedure<'_>,
        old: &Table,
        new: &Table,
    ) -> Result<(Vec<Trait>, Vec<Trait>), Error> {
        let timeout = timeout_millis(self.options.lock_timeout);
        let sql = likeness::traits(old.oid, new.oid, &new.full_name(), timeout);
        let mut retry = self.options.retry(procedure.deadline, u32::MAX);
        loop {
            retry.begin();
            let error = match self.env.ask(&sql).await {
                Ok(reply) => return Ok(likeness::read_traits(&reply)),
                Err(error) => error,
            };
            // Definitions are not shown while another session changes the table.
            let pause = self.env.pause_before_retry(&retry);
            let Some(pause) = pause.filter(|_| error.kind() == ErrorKind::LockTimeout) else {
                return Err(error);
            };
            // Cancel safety: no connection is held between two attempts.
            tokio::time::sleep(pause).await;
        }
    }

    fn refusal(&self, old: &Table, new: &Table, missing: &[&Trait]) -> String {
        let (readers, lacking): (Vec<&Trait>, Vec<&Trait>) =
            missing.iter().partition(|one| one.kind == "reader");
        let list = |of: &[&Trait], with_kind: bool| {
            let mut shown: Vec<_> = of
                .iter()
                .take(MAX_LISTED)
                .map(|one| match with_kind {
                    true => format!("{} {}", one.kind, one.what),
                    false => one.what.clone(),
                })
                .collect();
            if of.len() > MAX_LISTED {
                shown.push(format!("{} more", of.len() - MAX_LISTED));
            }
            shown.join("; ")
        };
        let mut text = String::new();
        if !lacking.is_empty() {
            text.push_str(&format!(
                "{} lacks what {} has: {}",
                new.full_name(),
                old.full_name(),
                list(&lacking, true)
            ));
        }
        if !readers.is_empty() {
            let and = if text.is_empty() { "" } else { "; " };
            text.push_str(&format!(
                "{and}these would continue to read the old table: {}",
                list(&readers, false)
            ));
        }
        let can_copy = !self.like_old && missing.iter().any(|one| one.copy.is_some());
        text.push_str(match can_copy {
            true => "; like_old() copies what a statement can copy, allow_differences() accepts the rest",
            false => "; allow_differences() accepts it",
        });
        text
    }
}

/// What the one has more often than the other.
fn missing(of_old: &[Trait], mut of_new: Vec<Trait>) -> Vec<&Trait> {
    let mut missing = Vec::new();
    // The indexes of two tables cannot have the same names; they get them in the swap.
    for one in of_old.iter().filter(|one| one.kind != "name") {
        let same = |other: &Trait| (&one.kind, &one.what) == (&other.kind, &other.what);
        match of_new.iter().position(same) {
            Some(at) => drop(of_new.swap_remove(at)),
            None => missing.push(one),
        }
    }
    missing
}
