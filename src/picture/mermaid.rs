//! The picture for Mermaid, which lays it out by itself.

use std::fmt::Write as _;

use super::text::{fit, mermaid};
use super::{Look, Picture};

/// Columns of a line. Mermaid refuses a text of more than 50 000 characters, and wraps long lines badly.
const COLUMNS: usize = 48;

pub(super) fn write(picture: &Picture) -> String {
    let mut out = String::from("flowchart RL\n");
    for (at, card) in picture.cards.iter().enumerate() {
        let mut lines = vec![card.name.clone()];
        if let Some(badge) = &card.badge {
            lines[0].push_str(", ");
            lines[0].push_str(badge);
        }
        for line in &card.lines {
            lines.push(fit(&line.text, COLUMNS, line.keep_end));
        }
        let label: Vec<_> = lines
            .iter()
            .map(|line| mermaid(&fit(line, COLUMNS, false)))
            .collect();
        // Infallible, as all others below: writing to a String.
        let _ = writeln!(out, "    s{at}[\"{}\"]", label.join("<br/>"));
    }
    for link in &picture.links {
        let arrow = if link.soft { "-.->" } else { "-->" };
        let label = mermaid(&fit(&link.label, COLUMNS, false));
        let label = if label.is_empty() {
            String::new()
        } else {
            format!("|\"{label}\"|")
        };
        let _ = writeln!(out, "    s{} {arrow}{label} s{}", link.waiter, link.blocker);
    }
    // Borders and nothing else: the rest follows the theme, light or dark.
    for (class, style, applies) in [
        ("root", "stroke:#d1242f,stroke-width:3px", 0),
        ("circle", "stroke:#8250df,stroke-width:3px", 1),
        ("unknown", "stroke-dasharray:4 3", 2),
    ] {
        let members: Vec<_> = picture
            .cards
            .iter()
            .enumerate()
            .filter(|(_, card)| match applies {
                0 => card.look == Look::Root && !card.in_circle,
                1 => card.in_circle,
                _ => card.hidden || card.look == Look::Fold,
            })
            .map(|(at, _)| format!("s{at}"))
            .collect();
        if !members.is_empty() {
            let _ = writeln!(out, "    classDef {class} {style}");
            let _ = writeln!(out, "    class {} {class}", members.join(","));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::testing::small;
    use super::*;

    #[test]
    fn a_flowchart() {
        assert_eq!(
            write(&small()),
            "flowchart RL
    s0[\"pid 1, blocks 2<br/>billing #34;x#34; src/pay.rs:42\"]
    s1[\"pid 2<br/>waits 3.2s for ShareLock\"]
    s2[\"1 more session\"]
    s1 -->|\"ExclusiveLock\"| s0
    s2 -.-> s0
    classDef root stroke:#d1242f,stroke-width:3px
    class s0 root
    classDef unknown stroke-dasharray:4 3
    class s2 unknown
"
        );
        assert_eq!(write(&Picture::default()), "flowchart RL\n");
    }
}
