//! The diagram as DOT; Graphviz lays it out.

use std::fmt::Write as _;

use super::text::{dot, fit};
use super::{Diagram, NodeStyle};

const MAX_COLUMNS: usize = 60;

pub(super) fn write(diagram: &Diagram) -> String {
    let mut out = String::from(
        "digraph locks {\n    rankdir=RL;\n    node [shape=box, fontname=\"monospace\", fontsize=10];\n    \
         edge [fontname=\"monospace\", fontsize=9];\n",
    );
    for (at, node) in diagram.nodes.iter().enumerate() {
        let mut head = node.name.clone();
        if let Some(badge) = &node.badge {
            head.push_str(", ");
            head.push_str(badge);
        }
        // `\l` ends a line and aligns it to the left.
        let mut label = format!("{}\\l", dot(&fit(&head, MAX_COLUMNS, false)));
        for line in &node.lines {
            label.push_str(&dot(&fit(&line.text, MAX_COLUMNS, line.keep_end)));
            label.push_str("\\l");
        }
        let mut more = String::new();
        let mut style = Vec::new();
        if node.hidden || node.style == NodeStyle::Collapsed {
            style.push("dashed");
        }
        if node.in_cycle {
            more.push_str(", color=\"#8250df\"");
            style.push("bold");
        } else if node.style == NodeStyle::Root {
            more.push_str(", color=\"#d1242f\"");
            style.push("bold");
        }
        if !style.is_empty() {
            // Infallible, as all others below: writing to a String.
            let _ = write!(more, ", style=\"{}\"", style.join(","));
        }
        let _ = writeln!(out, "    s{at} [label=\"{label}\"{more}];");
    }
    for arrow in &diagram.arrows {
        let mut attributes = format!(
            "label=\"{}\", tooltip=\"{}\"",
            dot(&fit(&arrow.label, MAX_COLUMNS, false)),
            dot(&arrow.hint)
        );
        if arrow.soft {
            attributes.push_str(", style=dashed");
        }
        if arrow.in_cycle {
            attributes.push_str(", color=\"#8250df\"");
        }
        let _ = writeln!(
            out,
            "    s{} -> s{} [{attributes}];",
            arrow.waiter, arrow.blocker
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
