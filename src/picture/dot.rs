//! The picture for Graphviz, which lays it out by itself.

use std::fmt::Write as _;

use super::text::{dot, fit};
use super::{Look, Picture};

const COLUMNS: usize = 60;

pub(super) fn write(picture: &Picture) -> String {
    let mut out = String::from(
        "digraph locks {\n    rankdir=RL;\n    node [shape=box, fontname=\"monospace\", fontsize=10];\n    \
         edge [fontname=\"monospace\", fontsize=9];\n",
    );
    for (at, card) in picture.cards.iter().enumerate() {
        let mut head = card.name.clone();
        if let Some(badge) = &card.badge {
            head.push_str(", ");
            head.push_str(badge);
        }
        // `\l`: ends a line, and puts it to the left.
        let mut label = format!("{}\\l", dot(&fit(&head, COLUMNS, false)));
        for line in &card.lines {
            label.push_str(&dot(&fit(&line.text, COLUMNS, line.keep_end)));
            label.push_str("\\l");
        }
        let mut more = String::new();
        let mut style = Vec::new();
        if card.hidden || card.look == Look::Fold {
            style.push("dashed");
        }
        if card.in_circle {
            more.push_str(", color=\"#8250df\"");
            style.push("bold");
        } else if card.look == Look::Root {
            more.push_str(", color=\"#d1242f\"");
            style.push("bold");
        }
        if !style.is_empty() {
            // Infallible, as all others below: writing to a String.
            let _ = write!(more, ", style=\"{}\"", style.join(","));
        }
        let _ = writeln!(out, "    s{at} [label=\"{label}\"{more}];");
    }
    for link in &picture.links {
        let mut attributes = format!(
            "label=\"{}\", tooltip=\"{}\"",
            dot(&fit(&link.label, COLUMNS, false)),
            dot(&link.hint)
        );
        if link.soft {
            attributes.push_str(", style=dashed");
        }
        if link.in_circle {
            attributes.push_str(", color=\"#8250df\"");
        }
        let _ = writeln!(
            out,
            "    s{} -> s{} [{attributes}];",
            link.waiter, link.blocker
        );
    }
    out.push_str("}\n");
    out
}

#[cfg(test)]
mod tests {
    use super::super::testing::small;
    use super::*;

    #[test]
    fn a_directed_graph() {
        let text = write(&small());
        for line in [
            "s0 [label=\"pid 1, blocks 2\\lbilling \\\"x\\\" src/pay.rs:42\\l\", color=\"#d1242f\", style=\"bold\"];",
            "s1 [label=\"pid 2\\lwaits 3.2s for ShareLock\\l\"];",
            "s2 [label=\"1 more session\\l\", style=\"dashed\"];",
            "s1 -> s0 [label=\"ExclusiveLock\", tooltip=\"pid 2 waits for pid 1\"];",
            "s2 -> s0 [label=\"\", tooltip=\"\", style=dashed];",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(text.starts_with("digraph locks {\n") && text.ends_with("}\n"));
    }
}
