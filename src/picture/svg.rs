//! The picture drawn, for a page that has the styles.

use std::fmt::Write as _;

use super::layout::{CARD_COLUMNS, CARD_WIDTH, GAP, Place, baseline, layout};
use super::text::{fit, html, width};
use super::{Card, Link, Look, Picture};

/// Columns of a link's label.
const LABEL: usize = 24;

/// An `svg` element; nothing where there is nothing to draw.
pub(super) fn write(picture: &Picture) -> String {
    let mut out = String::new();
    if picture.cards.is_empty() {
        return out;
    }
    let layout = layout(&picture.cards);
    let (width, height) = (layout.width, layout.height);
    // Infallible, as all others below: writing to a String.
    let _ = write!(
        out,
        "<svg width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-label=\"Who waits for whom\">\n<defs>"
    );
    for (id, class) in [("arrow", "tip"), ("arrow-circle", "tip circle")] {
        let _ = write!(
            out,
            "<marker id=\"{id}\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"11\" markerHeight=\"11\" markerUnits=\"userSpaceOnUse\" \
             orient=\"auto\"><path class=\"{class}\" d=\"M0 0.5L8 4L0 7.5z\"/></marker>"
        );
    }
    out.push_str("</defs>\n");
    for link in &picture.links {
        draw_link(&mut out, picture, link, &layout.places);
    }
    for (card, place) in picture.cards.iter().zip(&layout.places) {
        draw_card(&mut out, card, place);
    }
    out.push_str("</svg>\n");
    out
}

fn draw_link(out: &mut String, picture: &Picture, link: &Link, places: &[Place]) {
    let (waiter, blocker) = (&places[link.waiter], &places[link.blocker]);
    let principal = picture.is_principal(link);
    let mut class = String::from("link");
    for (name, applies) in [("soft", link.soft), ("circle", link.in_circle)] {
        if applies {
            class.push(' ');
            class.push_str(name);
        }
    }
    let arrow = if link.in_circle {
        "arrow-circle"
    } else {
        "arrow"
    };
    let _ = write!(
        out,
        "<g class=\"{class}\"><title>{}</title><path d=\"{}\" marker-end=\"url(#{arrow})\"/>",
        html(&link.hint),
        curve(waiter, blocker, principal)
    );
    if principal && !link.label.is_empty() {
        let _ = write!(
            out,
            "<text class=\"label\" x=\"{}\" y=\"{}\">{}</text>",
            waiter.x - 10,
            waiter.middle() - 6,
            html(&fit(&link.label, LABEL, false))
        );
    }
    out.push_str("</g>\n");
}

/// From the waiter's card to that of the blocker.
fn curve(waiter: &Place, blocker: &Place, principal: bool) -> String {
    let right = |place: &Place| place.x + CARD_WIDTH;
    // Beside the links along which cards stand, not over them.
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
    // A straight piece below the label, then over to the other height.
    if principal {
        let bend = x1 - (GAP - 46);
        let half = x2.midpoint(bend);
        return format!("M{x1} {y1}L{bend} {y1}C{half} {y1} {half} {y2} {x2} {y2}");
    }
    let half = x1.midpoint(x2);
    format!("M{x1} {y1}C{half} {y1} {half} {y2} {x2} {y2}")
}

fn draw_card(out: &mut String, card: &Card, place: &Place) {
    let mut class = String::from(match card.look {
        Look::Root => "card root",
        Look::Waiter => "card",
        Look::Fold => "card fold",
    });
    for (name, applies) in [("circle", card.in_circle), ("hidden", card.hidden)] {
        if applies {
            class.push(' ');
            class.push_str(name);
        }
    }
    if let Some(row) = &card.row {
        let _ = write!(out, "<a href=\"#{}\">", html(row));
    }
    let _ = write!(out, "<g class=\"{class}\"><title>{}", html(&card.name));
    for line in &card.lines {
        let _ = write!(out, "\n{}", html(&line.text));
    }
    let Place { x, y, height, .. } = *place;
    let _ = write!(
        out,
        "</title><rect x=\"{x}\" y=\"{y}\" width=\"{CARD_WIDTH}\" height=\"{height}\" rx=\"6\"/>"
    );
    let mut room = CARD_COLUMNS;
    if let Some(badge) = &card.badge {
        let badge = fit(badge, CARD_COLUMNS / 2, false);
        room -= width(&badge) + 2;
        let _ = write!(
            out,
            "<text class=\"badge\" x=\"{}\" y=\"{}\">{}</text>",
            x + CARD_WIDTH - 12,
            y + baseline(0),
            html(&badge)
        );
    }
    let x = x + 12;
    let _ = write!(
        out,
        "<text class=\"name\" x=\"{x}\" y=\"{}\">{}</text>",
        y + baseline(0),
        html(&fit(&card.name, room, false))
    );
    for (at, line) in card.lines.iter().enumerate() {
        let _ = write!(
            out,
            "<text x=\"{x}\" y=\"{}\">{}</text>",
            y + baseline(at + 1),
            html(&fit(&line.text, CARD_COLUMNS, line.keep_end))
        );
    }
    out.push_str("</g>");
    if card.row.is_some() {
        out.push_str("</a>");
    }
    out.push('\n');
}
