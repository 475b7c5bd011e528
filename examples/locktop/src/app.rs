//! What is seen, what is selected, and what a key means: no terminal, no server.

use std::time::Duration;

use lockkeeper::graph::{Backend, BackendId, LockTree, TreeNode};
use lockkeeper::{AdvisoryLockEntry, Error, Health, Monitor};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::widgets::ListState;

/// One look at the server.
pub(crate) struct Look {
    pub(crate) health: Health,
    pub(crate) tree: LockTree,
    pub(crate) advisory: Vec<AdvisoryLockEntry>,
}

impl Look {
    /// Two messages: the tree is made from what health was made from.
    pub(crate) async fn take(monitor: &Monitor) -> Result<Self, Error> {
        let health = monitor.health().await?;
        let advisory = monitor.advisory_locks().await?;
        Ok(Self {
            tree: health.snapshot().tree(),
            health,
            advisory,
        })
    }

    /// The tree's nodes in the order of its lines.
    pub(crate) fn nodes(&self) -> Vec<(usize, TreeNode<'_>)> {
        self.tree.walk().collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Panel {
    Tree,
    Advisory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Cancel,
    Terminate,
}

/// What the keys ask for.
#[derive(Debug, PartialEq)]
pub(crate) enum Command {
    Quit,
    Refresh,
    /// To the session as it was seen when the question was asked: the monitor signals no other.
    Signal(Action, Box<Backend>),
}

pub(crate) struct App {
    pub(crate) look: Option<Look>,
    /// Why the last look failed; what is shown then is the one before.
    pub(crate) trouble: Option<String>,
    /// What came of the last action.
    pub(crate) message: Option<String>,
    pub(crate) panel: Panel,
    pub(crate) paused: bool,
    pub(crate) statements: bool,
    pub(crate) every: Duration,
    /// Asked for, and not confirmed yet.
    pub(crate) question: Option<(Action, Box<Backend>)>,
    pub(crate) tree: ListState,
    pub(crate) advisory: ListState,
    /// Selections go with their sessions, wherever these move.
    selected: [Option<BackendId>; 2],
}

impl App {
    pub(crate) fn new(every: Duration) -> Self {
        Self {
            look: None,
            trouble: None,
            message: None,
            panel: Panel::Tree,
            paused: false,
            statements: false,
            every,
            question: None,
            tree: ListState::default(),
            advisory: ListState::default(),
            selected: [None, None],
        }
    }

    pub(crate) fn looked(&mut self, look: Result<Look, Error>) {
        match look {
            Ok(look) => {
                self.trouble = None;
                self.look = Some(look);
                for panel in [Panel::Tree, Panel::Advisory] {
                    self.follow(panel);
                }
            }
            Err(error) => self.trouble = Some(chain(&error)),
        }
    }

    pub(crate) fn key(&mut self, key: KeyEvent) -> Option<Command> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        let control_c =
            key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
        if control_c {
            return Some(Command::Quit);
        }
        if let Some((action, backend)) = self.question.take() {
            // Anything but a yes is a no.
            return match key.code {
                KeyCode::Char('y' | 'Y') => Some(Command::Signal(action, backend)),
                _ => {
                    self.message = Some("nothing was done".to_owned());
                    None
                }
            };
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Some(Command::Quit),
            KeyCode::Char('r') => return Some(Command::Refresh),
            KeyCode::Char('p') => self.paused = !self.paused,
            KeyCode::Char('s') => self.statements = !self.statements,
            KeyCode::Tab | KeyCode::BackTab => {
                self.panel = match self.panel {
                    Panel::Tree => Panel::Advisory,
                    Panel::Advisory => Panel::Tree,
                };
            }
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::PageDown => self.step(10),
            KeyCode::PageUp => self.step(-10),
            KeyCode::Home => self.step(isize::MIN),
            KeyCode::End => self.step(isize::MAX),
            KeyCode::Char('c') => self.ask(Action::Cancel),
            KeyCode::Char('t') => self.ask(Action::Terminate),
            _ => {}
        }
        None
    }

    fn ask(&mut self, action: Action) {
        self.message = None;
        match self.backend().cloned() {
            Some(backend) => self.question = Some((action, Box::new(backend))),
            None => self.message = Some("no session is selected".to_owned()),
        }
    }

    /// The selected session.
    pub(crate) fn backend(&self) -> Option<&Backend> {
        let look = self.look.as_ref()?;
        match self.panel {
            Panel::Tree => {
                let (_, node) = look.tree.walk().nth(self.tree.selected()?)?;
                Some(node.backend())
            }
            Panel::Advisory => Some(look.advisory.get(self.advisory.selected()?)?.backend()),
        }
    }

    fn ids(&self, panel: Panel) -> Vec<BackendId> {
        let Some(look) = &self.look else {
            return Vec::new();
        };
        match panel {
            Panel::Tree => look
                .tree
                .walk()
                .map(|(_, node)| node.backend().id().clone())
                .collect(),
            Panel::Advisory => look
                .advisory
                .iter()
                .map(|entry| entry.backend().id().clone())
                .collect(),
        }
    }

    fn state(&mut self, panel: Panel) -> &mut ListState {
        match panel {
            Panel::Tree => &mut self.tree,
            Panel::Advisory => &mut self.advisory,
        }
    }

    fn step(&mut self, by: isize) {
        let panel = self.panel;
        let ids = self.ids(panel);
        let at = self.state(panel).selected().unwrap_or(0);
        self.select(panel, &ids, at.saturating_add_signed(by));
    }

    /// Finds the selected session in a new look; where it is gone, what has taken its place is selected.
    fn follow(&mut self, panel: Panel) {
        let ids = self.ids(panel);
        let before = self.state(panel).selected().unwrap_or(0);
        let wanted = self.selected[panel as usize].clone();
        // One session can have several lines of advisory locks.
        let at = if ids.get(before) == wanted.as_ref() {
            before
        } else {
            let found = wanted.and_then(|id| ids.iter().position(|other| *other == id));
            found.unwrap_or(before)
        };
        self.select(panel, &ids, at);
    }

    fn select(&mut self, panel: Panel, ids: &[BackendId], at: usize) {
        let at = (!ids.is_empty()).then(|| at.min(ids.len() - 1));
        self.state(panel).select(at);
        self.selected[panel as usize] = at.map(|at| ids[at].clone());
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
