//! The diagram as a Mermaid flowchart; Mermaid lays it out.

use std::fmt::Write as _;

use super::text::{fit, mermaid};
use super::{Diagram, NodeStyle};

/// The width of a line. Mermaid rejects a text of more than 50 000 characters, and wraps long lines badly.
const MAX_COLUMNS: usize = 48;

pub(super) fn write(diagram: &Diagram) -> String {
    let mut out = String::from("flowchart RL\n");
    for (at, node) in diagram.nodes.iter().enumerate() {
        let mut lines = vec![node.name.clone()];
        if let Some(badge) = &node.badge {
            lines[0].push_str(", ");
            lines[0].push_str(badge);
        }
        for line in &node.lines {
            lines.push(fit(&line.text, MAX_COLUMNS, line.keep_end));
        }
        let label: Vec<_> = lines
            .iter()
            .map(|line| mermaid(&fit(line, MAX_COLUMNS, false)))
            .collect();
        // Infallible, as all others below: writing to a String.
        let _ = writeln!(out, "    s{at}[\"{}\"]", label.join("<br/>"));
    }
    for arrow in &diagram.arrows {
        let shape = if arrow.soft { "-.->" } else { "-->" };
        let label = mermaid(&fit(&arrow.label, MAX_COLUMNS, false));
        let label = if label.is_empty() {
            String::new()
        } else {
            format!("|\"{label}\"|")
        };
        let _ = writeln!(
            out,
            "    s{} {shape}{label} s{}",
            arrow.waiter, arrow.blocker
        );
    }
    // Only borders are styled, so that everything else follows the light or dark theme.
    for (class, style, applies) in [
        ("root", "stroke:#d1242f,stroke-width:3px", 0),
        ("cycle", "stroke:#8250df,stroke-width:3px", 1),
        ("unknown", "stroke-dasharray:4 3", 2),
    ] {
        let members: Vec<_> = diagram
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| match applies {
                0 => node.style == NodeStyle::Root && !node.in_cycle,
                1 => node.in_cycle,
                _ => node.hidden || node.style == NodeStyle::Collapsed,
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
        assert_eq!(write(&Diagram::default()), "flowchart RL\n");
    }
}
