//! The diagram as SVG, for a page that has the styles.

use std::fmt::Write as _;

use super::layout::{GAP, NODE_COLUMNS, NODE_WIDTH, NodeBox, baseline, layout};
use super::text::{fit, html, width};
use super::{Arrow, Diagram, Node, NodeStyle};

/// Columns of an arrow's label.
const LABEL_COLUMNS: usize = 24;

/// An `svg` element; empty if there is nothing to draw.
pub(super) fn write(diagram: &Diagram) -> String {
    let mut out = String::new();
    if diagram.nodes.is_empty() {
        return out;
    }
    let layout = layout(&diagram.nodes);
    let (width, height) = (layout.width, layout.height);
    // Infallible, as all others below: writing to a String.
    let _ = write!(
        out,
        "<svg width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-label=\"Who waits for whom\">\n<defs>"
    );
    for (id, class) in [("arrow", "tip"), ("arrow-cycle", "tip cycle")] {
        let _ = write!(
            out,
            "<marker id=\"{id}\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"11\" markerHeight=\"11\" markerUnits=\"userSpaceOnUse\" \
             orient=\"auto\"><path class=\"{class}\" d=\"M0 0.5L8 4L0 7.5z\"/></marker>"
        );
    }
    out.push_str("</defs>\n");
    for arrow in &diagram.arrows {
        draw_arrow(&mut out, diagram, arrow, &layout.boxes);
    }
    for (node, bounds) in diagram.nodes.iter().zip(&layout.boxes) {
        draw_node(&mut out, node, bounds);
    }
    out.push_str("</svg>\n");
    out
}

fn draw_arrow(out: &mut String, diagram: &Diagram, arrow: &Arrow, boxes: &[NodeBox]) {
    let (waiter, blocker) = (&boxes[arrow.waiter], &boxes[arrow.blocker]);
    let principal = diagram.is_principal(arrow);
    let mut class = String::from("link");
    for (name, applies) in [("soft", arrow.soft), ("cycle", arrow.in_cycle)] {
        if applies {
            class.push(' ');
            class.push_str(name);
        }
    }
    let marker = if arrow.in_cycle {
        "arrow-cycle"
    } else {
        "arrow"
    };
    let _ = write!(
        out,
        "<g class=\"{class}\"><title>{}</title><path d=\"{}\" marker-end=\"url(#{marker})\"/>",
        html(&arrow.hint),
        curve(waiter, blocker, principal)
    );
    if principal && !arrow.label.is_empty() {
        let _ = write!(
            out,
            "<text class=\"label\" x=\"{}\" y=\"{}\">{}</text>",
            waiter.x - 10,
            waiter.middle() - 6,
            html(&fit(&arrow.label, LABEL_COLUMNS, false))
        );
    }
    out.push_str("</g>\n");
}

/// The path from the waiter's node to the blocker's.
fn curve(waiter: &NodeBox, blocker: &NodeBox, principal: bool) -> String {
    let right = |bounds: &NodeBox| bounds.x + NODE_WIDTH;
    // Next to the arrows between nodes and their parents, not over them.
    let aside = if principal { 0 } else { 14 };
    let (y1, y2) = (waiter.middle() + aside, blocker.middle() + aside);
    if waiter.column == blocker.column {
        let out = right(waiter) + (24 + waiter.y.abs_diff(blocker.y) / 12).min(GAP / 2);
        let x = right(waiter);
        return format!("M{x} {y1}C{out} {y1} {out} {y2} {x} {y2}");
    }
    let (x1, x2) = if waiter.column > blocker.column {
        (waiter.x, right(blocker))
    } else {
        (right(waiter), blocker.x)
    };
    // A straight piece below the label, then a curve to the other height.
    if principal {
        let bend = x1 - (GAP - 46);
        let half = x2.midpoint(bend);
        return format!("M{x1} {y1}L{bend} {y1}C{half} {y1} {half} {y2} {x2} {y2}");
    }
    let half = x1.midpoint(x2);
    format!("M{x1} {y1}C{half} {y1} {half} {y2} {x2} {y2}")
}

fn draw_node(out: &mut String, node: &Node, bounds: &NodeBox) {
    let mut class = String::from(match node.style {
        NodeStyle::Root => "card root",
        NodeStyle::Waiter => "card",
        NodeStyle::Collapsed => "card fold",
    });
    for (name, applies) in [("cycle", node.in_cycle), ("hidden", node.hidden)] {
        if applies {
            class.push(' ');
            class.push_str(name);
        }
    }
    if let Some(row) = &node.row {
        let _ = write!(out, "<a href=\"#{}\">", html(row));
    }
    let _ = write!(out, "<g class=\"{class}\"><title>{}", html(&node.name));
    for line in &node.lines {
        let _ = write!(out, "\n{}", html(&line.text));
    }
    let NodeBox { x, y, height, .. } = *bounds;
    let _ = write!(
        out,
        "</title><rect x=\"{x}\" y=\"{y}\" width=\"{NODE_WIDTH}\" height=\"{height}\" rx=\"6\"/>"
    );
    let mut room = NODE_COLUMNS;
    if let Some(badge) = &node.badge {
        let badge = fit(badge, NODE_COLUMNS / 2, false);
        room -= width(&badge) + 2;
        let _ = write!(
            out,
            "<text class=\"badge\" x=\"{}\" y=\"{}\">{}</text>",
            x + NODE_WIDTH - 12,
            y + baseline(0),
            html(&badge)
        );
    }
    let x = x + 12;
    let _ = write!(
        out,
        "<text class=\"name\" x=\"{x}\" y=\"{}\">{}</text>",
        y + baseline(0),
        html(&fit(&node.name, room, false))
    );
    for (at, line) in node.lines.iter().enumerate() {
        let _ = write!(
            out,
            "<text x=\"{x}\" y=\"{}\">{}</text>",
            y + baseline(at + 1),
            html(&fit(&line.text, NODE_COLUMNS, line.keep_end))
        );
    }
    out.push_str("</g>");
    if node.row.is_some() {
        out.push_str("</a>");
    }
    out.push('\n');
}
