//! The picture: from what is seen to a frame of text.

use std::fmt::Write as _;
use std::time::Duration;

use lockkeeper::graph::{Backend, TreeNode};
use lockkeeper::{AdvisoryLockEntry, ObservedValue};
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, List, ListItem, Paragraph, Wrap};

use super::app::{Action, App, Look, Panel};

const KEYS: &str =
    " ↑↓ select  Tab panel  c cancel  t terminate  s statement  p pause  r refresh  q quit";

pub(crate) fn draw(frame: &mut Frame<'_>, app: &mut App) {
    // On a small screen the first of its lines, who waits, is enough.
    let numbers_height = if frame.area().height < 32 { 3 } else { 9 };
    let [title, health, tree, advisory, selected, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(numbers_height),
        Constraint::Fill(2),
        Constraint::Fill(1),
        Constraint::Length(5),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(heading(app), title);
    frame.render_widget(numbers(app.look.as_ref()), health);
    draw_tree(frame, app, tree);
    draw_advisory(frame, app, advisory);
    frame.render_widget(details(app), selected);
    frame.render_widget(Line::from(KEYS).reversed(), keys);
    if let Some((action, backend)) = &app.question {
        draw_question(frame, *action, backend);
    }
}

fn heading(app: &App) -> Line<'static> {
    let mut line = Line::from(vec![Span::from(" locktop ").bold().reversed()]);
    if let Some(look) = &app.look {
        let took = look.health.snapshot().duration();
        line.push_span(format!(
            " {}, seen in {took:.1?}",
            plain(look.health.database())
        ));
    }
    if app.paused {
        line.push_span(Span::from("  paused").yellow());
    } else {
        line.push_span(format!(", every {:?}", app.every));
    }
    if let Some(trouble) = &app.trouble {
        line.push_span(Span::from(format!("  {}", plain(trouble))).red().bold());
    } else if let Some(message) = &app.message {
        line.push_span(Span::from(format!("  {}", plain(message))).yellow());
    }
    line
}

fn numbers(look: Option<&Look>) -> Paragraph<'static> {
    let Some(look) = look else {
        return Paragraph::new("nothing seen yet").block(Block::bordered().title(" health "));
    };
    let health = &look.health;
    // Whatever line its trouble is in.
    let trouble = [
        health.lock_waiters() > 0,
        false,
        matches!(health.oldest_idle_in_transaction().seen(), Some(Some(_))),
        health.lock_table().fill() > 0.5,
        false,
        health.prepared_transactions().count() > 0,
        !matches!(health.invalid_indexes(), ObservedValue::Known(none) if none.count() == 0),
    ];
    let text = health.to_string();
    let lines: Vec<_> = text
        .lines()
        .zip(trouble.into_iter().chain(std::iter::repeat(false)))
        .map(|(line, trouble)| {
            let style = if trouble {
                Style::new().fg(Color::Yellow)
            } else {
                Style::new()
            };
            Line::styled(plain(line), style)
        })
        .collect();
    Paragraph::new(lines).block(Block::bordered().title(" health "))
}

fn panel(title: String, focus: bool) -> Block<'static> {
    let block = Block::bordered().title(title);
    if focus {
        block.border_style(Style::new().fg(Color::Cyan))
    } else {
        block
    }
}

fn draw_tree(frame: &mut Frame<'_>, app: &mut App, area: Rect) {
    let nodes = app.look.as_ref().map(Look::nodes).unwrap_or_default();
    let lines: Vec<_> = nodes
        .iter()
        .map(|(depth, node)| ListItem::new(tree_line(*depth, node)))
        .collect();
    let title = format!(" who waits for whom ({}) ", lines.len());
    let list = List::new(lines)
        .block(panel(title, app.panel == Panel::Tree))
        .highlight_symbol("> ")
        .highlight_style(Style::new().add_modifier(Modifier::BOLD));
    frame.render_stateful_widget(list, area, &mut app.tree);
}

fn tree_line(depth: usize, node: &TreeNode<'_>) -> Line<'static> {
    let mut text = "  ".repeat(depth.min(12));
    if depth > 0 {
        text.push_str("└ ");
    }
    // Infallible: writing to a String.
    let _ = write!(text, "{}", node.backend().id());
    if node.blocked_count() > 0 {
        let _ = write!(text, " blocks {}", node.blocked_count());
    }
    if let Some(edge) = node.edge() {
        if let Some(waited) = edge.wait_age() {
            let _ = write!(text, ", waits {}", age(waited));
        }
        let what = if edge.is_soft() { ", queued" } else { "" };
        let _ = write!(
            text,
            " for {} on {}{what}",
            edge.mode_wanted(),
            edge.object()
        );
    }
    let mut about = String::from("  ");
    if node.is_in_cycle() {
        about.push_str("in a cycle; ");
    }
    about.push_str(&who(node.backend()));
    let colour = match (node.edge(), node.is_in_cycle()) {
        (_, true) => Color::Magenta,
        (None, _) => Color::Red,
        (Some(_), _) => Color::Yellow,
    };
    Line::from(vec![
        Span::styled(plain(&text), Style::new().fg(colour)),
        Span::from(plain(&about)),
    ])
}

fn draw_advisory(frame: &mut Frame<'_>, app: &mut App, area: Rect) {
    let entries = app.look.as_ref().map_or(&[][..], |look| &look.advisory);
    let lines: Vec<_> = entries
        .iter()
        .map(|entry| ListItem::new(advisory_line(entry)))
        .collect();
    let title = format!(" advisory locks ({}) ", lines.len());
    let list = List::new(lines)
        .block(panel(title, app.panel == Panel::Advisory))
        .highlight_symbol("> ")
        .highlight_style(Style::new().add_modifier(Modifier::BOLD));
    frame.render_stateful_widget(list, area, &mut app.advisory);
}

fn advisory_line(entry: &AdvisoryLockEntry) -> Line<'static> {
    let (what, colour) = match (entry.is_held(), entry.idle_for()) {
        // What may have been forgotten.
        (true, Some(idle)) if !entry.is_guarded() => {
            (format!("held, idle {}", age(idle)), Color::Yellow)
        }
        (true, _) => ("held".to_owned(), Color::Green),
        (false, _) => {
            let waited = entry.wait_age().map(age).unwrap_or_default();
            (format!("wanted for {waited}"), Color::Red)
        }
    };
    let about = format!(
        " in {} by {}  {}",
        entry.mode(),
        entry.backend().id(),
        who(entry.backend())
    );
    Line::from(vec![
        Span::from(plain(&entry.key().to_string())),
        Span::styled(format!(" {what}"), Style::new().fg(colour)),
        Span::from(plain(&about)),
    ])
}

fn details(app: &App) -> Paragraph<'static> {
    let block = Block::bordered().title(" selected ");
    let Some(backend) = app.backend() else {
        return Paragraph::new("").block(block);
    };
    let mut lines = vec![Line::from(plain(&backend.to_string()))];
    lines.push(match (app.statements, backend.statement()) {
        // As its client sent it: literals are data, so that it takes a key.
        (true, Some(statement)) => Line::from(plain(statement)).cyan(),
        (true, None) if backend.is_hidden() => Line::from("statement hidden from this role"),
        (true, None) => Line::from("no statement"),
        (false, _) => Line::from("s shows the statement, with its literals").dim(),
    });
    Paragraph::new(lines).wrap(Wrap { trim: true }).block(block)
}

fn draw_question(frame: &mut Frame<'_>, action: Action, backend: &Backend) {
    let (title, what) = match action {
        Action::Cancel => (
            " cancel? ",
            "Its running statement fails with an error, which fails its transaction.",
        ),
        Action::Terminate => (
            " terminate? ",
            "Its connection is closed, and its transaction rolled back.",
        ),
    };
    let area = frame.area();
    let area = area.centered(
        Constraint::Length(area.width.min(76)),
        Constraint::Length(area.height.min(7)),
    );
    let text = vec![
        Line::from(plain(&backend.to_string())),
        Line::from(what),
        Line::from("y does it, any other key does not").bold(),
    ];
    frame.render_widget(Clear, area);
    let block = Block::bordered().title(title).red();
    let question = Paragraph::new(text).wrap(Wrap { trim: true }).block(block);
    frame.render_widget(question, area);
}

fn who(backend: &Backend) -> String {
    let mut text = match backend.application_name() {
        Some("") | None => String::new(),
        Some(name) => name.to_owned(),
    };
    if backend.is_hidden() {
        text.push_str(" (state hidden)");
    } else if let Some(state) = backend.state() {
        let _ = write!(text, " ({state}");
        if let Some(lasts) = backend.state_age() {
            let _ = write!(text, " {}", age(lasts));
        }
        text.push(')');
    }
    text
}

fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{:.1}s", age.as_secs_f64()),
        60..3600 => format!("{}min {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}min", seconds / 3600, seconds / 60 % 60),
    }
}

/// On one line, and nothing that a terminal would take for a command.
fn plain(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(plain).collect()
}

/// A frame as text, for where there is no terminal.
pub(crate) fn text(buffer: &Buffer) -> String {
    let area = buffer.area;
    let mut text = String::new();
    for y in area.top()..area.bottom() {
        let mut line = String::new();
        for x in area.left()..area.right() {
            line.push_str(buffer[(x, y)].symbol());
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
