//! The display of `ch-fleet top` and its keys.

use fleet::agent::{PublishedState, Status, VmStatus};
use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Wrap};

use crate::tables;

/// Help line at the bottom.
const KEYS: &str =
    "q quit  ↑↓ select  s sort  r reverse  space pause  enter/e explain  v views  h help";
const HELP: &str = "CL class   LV feature level   CONF configured   RES resident on the host\n\
                    TGT balloon asked for   ACT balloon as the guest claims   AVAIL available inside\n\
                    POP/S populated again a second   AGE of the sample, s   DECISION the last one's reason";

/// Sort order of the VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Name,
    Resident,
    Balloon,
    Populated,
}

/// Content of the lower part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    Vms,
    Reservations,
}

/// The state of the screen.
#[derive(Debug)]
pub(crate) struct Screen {
    status: Status,
    sort: Sort,
    reverse: bool,
    selected: usize,
    explained: bool,
    help: bool,
    view: View,
    pub(crate) paused: bool,
}

impl Screen {
    pub(crate) fn new(status: Status) -> Self {
        Self {
            status,
            sort: Sort::Name,
            reverse: false,
            selected: 0,
            explained: false,
            help: false,
            view: View::Vms,
            paused: false,
        }
    }

    /// Stores the figures of a new round.
    pub(crate) fn take(&mut self, status: Status) {
        self.status = status;
    }

    /// Handles a key; returns false to quit.
    pub(crate) fn key(&mut self, key: KeyEvent) -> bool {
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => {
                let last = self.status.vms.len().saturating_sub(1);
                self.selected = (self.selected + 1).min(last);
            }
            KeyCode::Char('s') => {
                self.sort = match self.sort {
                    Sort::Name => Sort::Resident,
                    Sort::Resident => Sort::Balloon,
                    Sort::Balloon => Sort::Populated,
                    Sort::Populated => Sort::Name,
                }
            }
            KeyCode::Char('r') => self.reverse = !self.reverse,
            KeyCode::Char(' ') => self.paused = !self.paused,
            KeyCode::Char('e') | KeyCode::Enter => self.explained = !self.explained,
            KeyCode::Char('h' | '?') => self.help = !self.help,
            KeyCode::Char('v') => {
                self.view = match self.view {
                    View::Vms => View::Reservations,
                    View::Reservations => View::Vms,
                }
            }
            _ => {}
        }
        true
    }

    fn sorted(&self) -> Vec<&VmStatus> {
        let mut vms: Vec<&VmStatus> = self.status.vms.iter().collect();
        match self.sort {
            Sort::Name => {}
            Sort::Resident => vms.sort_by_key(|vm| std::cmp::Reverse(vm.resident)),
            Sort::Balloon => vms.sort_by_key(|vm| std::cmp::Reverse(vm.actual)),
            Sort::Populated => vms.sort_by_key(|vm| std::cmp::Reverse(vm.repopulated_per_s)),
        }
        if self.reverse {
            vms.reverse();
        }
        vms
    }
}

/// Draws everything; 80 × 24 characters suffice.
pub(crate) fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let below = match (screen.help, screen.explained) {
        (true, _) => 3,
        (_, true) => 5,
        _ => 0,
    };
    let [host, list, detail, keys] = Layout::vertical([
        Constraint::Length(5),
        Constraint::Min(3),
        Constraint::Length(below),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(host_lines(&screen.status), host);
    match screen.view {
        View::Vms => frame.render_widget(vm_lines(screen, usize::from(list.height)), list),
        View::Reservations => {
            let text = text_of(|out| tables::reservations(out, &screen.status.reservations));
            frame.render_widget(Paragraph::new(text), list);
        }
    }
    let words = if screen.help {
        HELP.to_owned()
    } else {
        let vms = screen.sorted();
        let chosen = vms.get(screen.selected);
        chosen.map_or_else(String::new, |vm| vm.explanation.clone())
    };
    frame.render_widget(Paragraph::new(words).wrap(Wrap { trim: true }), detail);
    let paused = if screen.paused { "PAUSED  " } else { "" };
    frame.render_widget(
        Paragraph::new(format!("{paused}{KEYS}")).style(Style::new().add_modifier(Modifier::DIM)),
        keys,
    );
}

fn host_lines(status: &Status) -> Paragraph<'static> {
    let color = match status.host.state {
        PublishedState::Green => Color::Green,
        PublishedState::Yellow => Color::Yellow,
        PublishedState::Orange => Color::LightRed,
        PublishedState::Red => Color::Red,
        PublishedState::Unknown => Color::Magenta,
    };
    let text = text_of(|out| tables::host(out, status));
    let lines: Vec<Line<'static>> = text
        .lines()
        .enumerate()
        .map(|(number, line)| {
            let line = Line::from(line.to_owned());
            if number == 0 {
                line.style(Style::new().fg(color).add_modifier(Modifier::BOLD))
            } else {
                line
            }
        })
        .collect();
    Paragraph::new(lines).wrap(Wrap { trim: true })
}

fn vm_lines(screen: &Screen, height: usize) -> Paragraph<'static> {
    let header = Style::new().add_modifier(Modifier::REVERSED);
    let mut lines = vec![Line::styled(tables::VM_HEADER, header)];
    // Keeps the selected VM visible.
    let room = height.saturating_sub(1).max(1);
    let first = (screen.selected + 1).saturating_sub(room);
    for (number, vm) in screen
        .sorted()
        .into_iter()
        .enumerate()
        .skip(first)
        .take(room)
    {
        let mut style = Style::new();
        if !vm.up || vm.suffering {
            style = style.fg(Color::Red);
        }
        if number == screen.selected {
            style = style.add_modifier(Modifier::BOLD | Modifier::UNDERLINED);
        }
        lines.push(Line::styled(tables::vm_line(vm), style));
    }
    Paragraph::new(lines)
}

fn text_of(write: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()>) -> String {
    let mut bytes = Vec::new();
    // Writing to a vector cannot fail.
    let _ = write(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use fleet::model::Bytes;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn screen() -> Screen {
        let vm = |name: &str, gib: u64| VmStatus {
            vm: name.to_owned(),
            up: true,
            trusted: true,
            configured: Bytes::gib(4),
            resident: Bytes::gib(gib),
            reason: "no-need".to_owned(),
            explanation: format!("{name}: balloon stays"),
            ..VmStatus::default()
        };
        let mut status = Status {
            vms: vec![vm("alpha", 1), vm("beta", 3)],
            reload_ok: true,
            ..Status::default()
        };
        status.host.name = "host-7".to_owned();
        status.host.state = PublishedState::Green;
        Screen::new(status)
    }

    fn drawn(screen: &Screen) -> String {
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| draw(frame, screen)).unwrap();
        terminal.backend().to_string()
    }

    fn press(screen: &mut Screen, code: KeyCode) -> bool {
        screen.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn screen_shows_host_vms_and_keys_in_80_columns() {
        let text = drawn(&screen());
        for word in ["host-7", "GREEN", "alpha", "beta", "no-need", "q quit"] {
            assert!(text.contains(word), "no {word} in\n{text}");
        }
    }

    #[test]
    fn keys_sort_select_explain_and_end() {
        let mut screen = screen();
        press(&mut screen, KeyCode::Char('s'));
        let text = drawn(&screen);
        assert!(
            text.find("beta").unwrap() < text.find("alpha").unwrap(),
            "{text}"
        );
        press(&mut screen, KeyCode::Down);
        press(&mut screen, KeyCode::Char('e'));
        assert!(drawn(&screen).contains("alpha: balloon stays"));
        press(&mut screen, KeyCode::Char('h'));
        assert!(drawn(&screen).contains("resident on the host"));
        press(&mut screen, KeyCode::Char(' '));
        assert!(screen.paused && drawn(&screen).contains("PAUSED"));
        assert!(!press(&mut screen, KeyCode::Char('q')));
    }
}
