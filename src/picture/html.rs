//! A page of HTML that needs nothing but itself: no script, no network, no fonts of its own.

use std::fmt::Write as _;

use super::text::html;
use super::{Picture, svg};

const STYLE: &str = include_str!("page.css");

/// What stands on a page, from the top.
#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    pub(crate) title: String,
    /// Below the title, a line each.
    pub(crate) facts: Vec<String>,
    /// What nobody should overlook.
    pub(crate) alarms: Vec<String>,
    pub(crate) picture: Picture,
    pub(crate) sections: Vec<Section>,
}

#[derive(Clone, Debug)]
pub(crate) enum Section {
    /// Paragraphs.
    Text {
        heading: String,
        lines: Vec<String>,
    },
    /// Text whose lines are kept.
    Verbatim {
        heading: String,
        text: String,
    },
    Table(Table),
    /// Shown when asked for.
    Folded(Table),
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub(crate) heading: String,
    pub(crate) columns: Vec<&'static str>,
    pub(crate) rows: Vec<Row>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Row {
    /// Where cards lead to.
    pub(crate) id: Option<String>,
    /// How far its first cell is moved to the right.
    pub(crate) depth: usize,
    pub(crate) marked: bool,
    pub(crate) cells: Vec<Cell>,
}

/// Lines of text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cell {
    pub(crate) lines: Vec<String>,
    pub(crate) code: bool,
}

impl Cell {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self::lines(vec![text.into()])
    }

    pub(crate) fn lines(lines: Vec<String>) -> Self {
        Self { lines, code: false }
    }

    pub(crate) fn code(text: impl Into<String>) -> Self {
        Self {
            lines: vec![text.into()],
            code: true,
        }
    }
}

/// Deeper rows are not moved further.
const DEEPEST: usize = 12;

pub(crate) fn page(page: &Page) -> String {
    let title = html(&page.title);
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n"
    );
    for fact in &page.facts {
        // Infallible, as all others below: writing to a String.
        let _ = writeln!(out, "<p>{}</p>", html(fact));
    }
    out.push_str("</header>\n");
    if !page.alarms.is_empty() {
        out.push_str("<ul class=\"alarms\">\n");
        for alarm in &page.alarms {
            let _ = writeln!(out, "<li>{}</li>", html(alarm));
        }
        out.push_str("</ul>\n");
    }
    graph(&mut out, &page.picture);
    for (at, section) in page.sections.iter().enumerate() {
        write_section(&mut out, at, section);
    }
    out.push_str("</body>\n</html>\n");
    out
}

fn graph(out: &mut String, picture: &Picture) {
    let svg = svg::write(picture);
    if svg.is_empty() {
        return;
    }
    out.push_str(
        "<section aria-label=\"Wait graph\">\n<div class=\"scroll graph\" tabindex=\"0\">\n",
    );
    out.push_str(&svg);
    out.push_str(
        "</div>\n<p class=\"legend\">An arrow leads from a session that waits to one in its way, with the mode that one \
         holds. A card leads to its row below.",
    );
    if picture.links.iter().any(|link| link.soft) {
        out.push_str(
            " <span class=\"key\">Dashed</span>: it holds nothing in conflict, but waits for the same lock further ahead, \
             in that mode.",
        );
    }
    if picture.links.iter().any(|link| link.in_circle) {
        out.push_str(" <span class=\"key circle\">Violet</span>: part of a circle.");
    }
    for (number, one, more) in [
        (picture.sessions_left_out, "session is", "sessions are"),
        (picture.links_left_out, "arrow is", "arrows are"),
    ] {
        match number {
            0 => {}
            1 => {
                let _ = write!(out, " 1 more {one} not drawn.");
            }
            number => {
                let _ = write!(out, " {number} more {more} not drawn.");
            }
        }
    }
    out.push_str("</p>\n</section>\n");
}

fn write_section(out: &mut String, at: usize, section: &Section) {
    match section {
        Section::Text { heading, lines } => {
            let _ = writeln!(out, "<section>\n<h2>{}</h2>", html(heading));
            for line in lines {
                let _ = writeln!(out, "<p>{}</p>", html(line));
            }
        }
        Section::Verbatim { heading, text } => {
            let _ = writeln!(
                out,
                "<section>\n<h2>{}</h2>\n<pre>{}</pre>",
                html(heading),
                html(text)
            );
        }
        Section::Table(table) => {
            let _ = writeln!(
                out,
                "<section>\n<h2 id=\"t{at}\">{}</h2>",
                html(&table.heading)
            );
            write_table(out, &format!("aria-labelledby=\"t{at}\""), table);
        }
        Section::Folded(table) => {
            let heading = html(&table.heading);
            let _ = writeln!(out, "<section>\n<details>\n<summary>{heading}</summary>");
            write_table(out, &format!("aria-label=\"{heading}\""), table);
            out.push_str("</details>\n");
        }
    }
    out.push_str("</section>\n");
}

fn write_table(out: &mut String, label: &str, table: &Table) {
    let _ = write!(
        out,
        "<div class=\"scroll\" tabindex=\"0\">\n<table {label}>\n<thead><tr>"
    );
    for column in &table.columns {
        let _ = write!(out, "<th scope=\"col\">{}</th>", html(column));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        out.push_str("<tr");
        if let Some(id) = &row.id {
            let _ = write!(out, " id=\"{}\"", html(id));
        }
        if row.marked {
            out.push_str(" class=\"marked\"");
        }
        out.push('>');
        for (at, cell) in row.cells.iter().enumerate() {
            let depth = row.depth.min(DEEPEST);
            let (open, close) = match at {
                0 if depth > 0 => (format!("<th scope=\"row\" class=\"d{depth}\">"), "</th>"),
                0 => ("<th scope=\"row\">".to_owned(), "</th>"),
                _ if cell.code => ("<td class=\"code\">".to_owned(), "</td>"),
                _ => ("<td>".to_owned(), "</td>"),
            };
            out.push_str(&open);
            for (at, line) in cell.lines.iter().enumerate() {
                out.push_str(if at > 0 { "<br>" } else { "" });
                out.push_str(&html(line));
            }
            out.push_str(close);
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
}

#[cfg(test)]
mod tests {
    use super::super::testing::small;
    use super::*;

    const ODD: &str = "</title></style></svg><script>alert('x')</script>&amp;\"";

    #[test]
    fn no_text_is_markup() {
        let mut picture = small();
        picture.cards[0].name = ODD.into();
        picture.cards[0].badge = Some(ODD.into());
        picture.cards[0].lines[0].text = ODD.into();
        picture.cards[0].row = Some(ODD.into());
        picture.links[0].label = ODD.into();
        picture.links[0].hint = ODD.into();
        let table = Table {
            heading: ODD.into(),
            columns: vec![ODD],
            rows: vec![Row {
                id: Some(ODD.into()),
                depth: 2,
                marked: true,
                cells: vec![Cell::new(ODD), Cell::code(ODD)],
            }],
        };
        let text = page(&Page {
            title: ODD.into(),
            facts: vec![ODD.into()],
            alarms: vec![ODD.into()],
            picture,
            sections: vec![
                Section::Text {
                    heading: ODD.into(),
                    lines: vec![ODD.into()],
                },
                Section::Verbatim {
                    heading: ODD.into(),
                    text: ODD.into(),
                },
                Section::Table(table.clone()),
                Section::Folded(table),
            ],
        });
        assert_eq!(text.matches("<script").count(), 0);
        for tag in ["</title>", "</svg>", "</style>"] {
            let opened = text
                .matches(&tag.replacen('/', "", 1)[..tag.len() - 2])
                .count();
            assert_eq!(text.matches(tag).count(), opened, "{tag}");
        }
        assert!(text.matches("&lt;script&gt;").count() > 12);
        // Nothing is fetched.
        for fetched in ["://", "src=", "@import", "url(h", "<link", "<img"] {
            assert!(!text.contains(fetched), "{fetched}");
        }
    }

    #[test]
    fn an_empty_picture_is_not_drawn() {
        assert!(!page(&Page::default()).contains("<svg"));
    }
}
