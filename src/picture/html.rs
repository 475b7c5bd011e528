//! A self-contained page of HTML: no script, no network, no fonts of its own.

use std::fmt::Write as _;

use super::text::html;
use super::{Diagram, svg};

const STYLE: &str = include_str!("page.css");

/// The contents of a page, from top to bottom.
#[derive(Clone, Debug, Default)]
pub(crate) struct HtmlPage {
    pub(crate) title: String,
    /// Shown below the title, one per line.
    pub(crate) facts: Vec<String>,
    /// Warnings above the diagram.
    pub(crate) alarms: Vec<String>,
    pub(crate) diagram: Diagram,
    pub(crate) sections: Vec<HtmlSection>,
}

#[derive(Clone, Debug)]
pub(crate) enum HtmlSection {
    /// Paragraphs.
    Text {
        heading: String,
        lines: Vec<String>,
    },
    /// Preformatted text.
    Verbatim {
        heading: String,
        text: String,
    },
    Table(HtmlTable),
    /// A table that is collapsed at first.
    Collapsible(HtmlTable),
}

#[derive(Clone, Debug, Default)]
pub(crate) struct HtmlTable {
    pub(crate) heading: String,
    pub(crate) columns: Vec<&'static str>,
    pub(crate) rows: Vec<HtmlRow>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct HtmlRow {
    /// The target of links from the diagram.
    pub(crate) id: Option<String>,
    /// How far the first cell is indented.
    pub(crate) depth: usize,
    pub(crate) marked: bool,
    pub(crate) cells: Vec<HtmlCell>,
}

/// Lines of text.
#[derive(Clone, Debug, Default)]
pub(crate) struct HtmlCell {
    pub(crate) lines: Vec<String>,
    pub(crate) code: bool,
}

impl HtmlCell {
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

/// Deeper rows are not indented further.
const MAX_INDENT: usize = 12;

pub(crate) fn html_page(page: &HtmlPage) -> String {
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
    write_diagram(&mut out, &page.diagram);
    for (at, section) in page.sections.iter().enumerate() {
        write_section(&mut out, at, section);
    }
    out.push_str("</body>\n</html>\n");
    out
}

fn write_diagram(out: &mut String, diagram: &Diagram) {
    let svg = svg::write(diagram);
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
    if diagram.arrows.iter().any(|arrow| arrow.soft) {
        out.push_str(
            " <span class=\"key\">Dashed</span>: it holds nothing in conflict, but waits for the same lock further ahead, \
             in that mode.",
        );
    }
    if diagram.arrows.iter().any(|arrow| arrow.in_cycle) {
        out.push_str(" <span class=\"key cycle\">Violet</span>: part of a cycle.");
    }
    for (number, one, more) in [
        (diagram.sessions_left_out, "session is", "sessions are"),
        (diagram.arrows_left_out, "arrow is", "arrows are"),
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

fn write_section(out: &mut String, at: usize, section: &HtmlSection) {
    match section {
        HtmlSection::Text { heading, lines } => {
            let _ = writeln!(out, "<section>\n<h2>{}</h2>", html(heading));
            for line in lines {
                let _ = writeln!(out, "<p>{}</p>", html(line));
            }
        }
        HtmlSection::Verbatim { heading, text } => {
            let _ = writeln!(
                out,
                "<section>\n<h2>{}</h2>\n<pre>{}</pre>",
                html(heading),
                html(text)
            );
        }
        HtmlSection::Table(table) => {
            let _ = writeln!(
                out,
                "<section>\n<h2 id=\"t{at}\">{}</h2>",
                html(&table.heading)
            );
            write_table(out, &format!("aria-labelledby=\"t{at}\""), table);
        }
        HtmlSection::Collapsible(table) => {
            let heading = html(&table.heading);
            let _ = writeln!(out, "<section>\n<details>\n<summary>{heading}</summary>");
            write_table(out, &format!("aria-label=\"{heading}\""), table);
            out.push_str("</details>\n");
        }
    }
    out.push_str("</section>\n");
}

fn write_table(out: &mut String, label: &str, table: &HtmlTable) {
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
            let depth = row.depth.min(MAX_INDENT);
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
        let mut diagram = small();
        diagram.nodes[0].name = ODD.into();
        diagram.nodes[0].badge = Some(ODD.into());
        diagram.nodes[0].lines[0].text = ODD.into();
        diagram.nodes[0].row = Some(ODD.into());
        diagram.arrows[0].label = ODD.into();
        diagram.arrows[0].hint = ODD.into();
        let table = HtmlTable {
            heading: ODD.into(),
            columns: vec![ODD],
            rows: vec![HtmlRow {
                id: Some(ODD.into()),
                depth: 2,
                marked: true,
                cells: vec![HtmlCell::new(ODD), HtmlCell::code(ODD)],
            }],
        };
        let text = html_page(&HtmlPage {
            title: ODD.into(),
            facts: vec![ODD.into()],
            alarms: vec![ODD.into()],
            diagram,
            sections: vec![
                HtmlSection::Text {
                    heading: ODD.into(),
                    lines: vec![ODD.into()],
                },
                HtmlSection::Verbatim {
                    heading: ODD.into(),
                    text: ODD.into(),
                },
                HtmlSection::Table(table.clone()),
                HtmlSection::Collapsible(table),
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
        // The page fetches nothing.
        for fetched in ["://", "src=", "@import", "url(h", "<link", "<img"] {
            assert!(!text.contains(fetched), "{fetched}");
        }
    }

    #[test]
    fn an_empty_diagram_is_not_drawn() {
        assert!(!html_page(&HtmlPage::default()).contains("<svg"));
    }
}
