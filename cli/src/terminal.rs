//! What people see on standard error: messages, warnings, the last error, progress.
//!
//! Colour and progress bars appear on terminals only (`NO_COLOR` and `TERM=dumb` are heeded).
//! `--log-format internal-json` makes every line an object for other programs to read.
//! Source: cli, sections 3 and 9.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anstream::ColorChoice;
use anstyle::{AnsiColor, Style};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use larder_core::report::{Level, Progress, Reporter, Unit};
use serde_json::json;

use crate::args::{Common, LogFormat};
use crate::exit::{Failure, chain, indent};

/// A bar appears only for work that takes longer than this.
const BAR_AFTER: Duration = Duration::from_millis(400);

/// The least time between two results in the JSON log.
const RESULT_EVERY: Duration = Duration::from_millis(50);

const ERROR: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Magenta.on_default().bold();

/// Standard error.
#[derive(Debug)]
pub struct Terminal {
    verbosity: AtomicU8,
    json: AtomicBool,
    colour: bool,
    bars: bool,
    state: Mutex<State>,
}

/// A build in the JSON log.
#[derive(Debug)]
pub struct Activity {
    id: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Work under way, the innermost last.
    work: Vec<Work>,
    /// Bars of running builds, to be kept below what is written.
    live: Option<MultiProgress>,
    last_id: u64,
}

#[derive(Debug)]
struct Work {
    id: u64,
    what: String,
    total: Option<u64>,
    unit: Unit,
    done: u64,
    since: Instant,
    told: Instant,
    bar: Option<ProgressBar>,
}

impl Terminal {
    /// Standard error as it is, with the default verbosity.
    pub fn new() -> Self {
        let stderr = std::io::stderr();
        let colour = anstream::AutoStream::choice(&stderr) != ColorChoice::Never && stderr.is_terminal();
        Self {
            verbosity: AtomicU8::new(number(Level::Info)),
            json: AtomicBool::new(false),
            colour,
            bars: stderr.is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb"),
            state: Mutex::default(),
        }
    }

    /// Heeds the flags.
    pub fn configure(&self, common: &Common) {
        self.set_verbosity(common.verbosity());
        self.set_format(common.log_format);
    }

    pub fn set_format(&self, format: LogFormat) {
        self.json.store(format == LogFormat::InternalJson, Ordering::Relaxed);
    }

    pub fn set_verbosity(&self, level: Level) {
        self.verbosity.store(number(level), Ordering::Relaxed);
    }

    /// Does output of builders keep its colours?
    pub fn has_colour(&self) -> bool {
        self.colour
    }

    pub fn is_json(&self) -> bool {
        self.json.load(Ordering::Relaxed)
    }

    /// The last words of an applet: the error with its causes, and the hint after a usage error.
    pub fn failure(&self, applet: &str, failure: &Failure) {
        self.error(failure.error());
        if failure.is_usage() {
            self.put_hint(&format!("Try '{applet} --help' for more information."));
        }
    }

    /// An error, whatever the verbosity.
    pub fn error(&self, error: &(dyn Error + 'static)) {
        self.error_text(&chain(error));
    }

    /// An error that is a text already, with its causes.
    pub fn error_text(&self, text: &str) {
        let text = indent(text).to_string();
        if self.is_json() {
            self.put_json(&json!({
                "action": "msg", "column": null, "file": null, "level": 0, "line": null,
                "msg": format!("\u{1b}[31;1merror:\u{1b}[0m {text}"), "raw_msg": text,
            }));
        } else {
            self.put(&format!("{} {text}\n", self.painted("error:", ERROR)));
        }
    }

    fn put_hint(&self, text: &str) {
        if self.is_json() {
            self.put_json(&json!({"action": "msg", "level": 0, "msg": text}));
        } else {
            self.put(&format!("{text}\n"));
        }
    }

    fn painted(&self, text: &str, style: Style) -> String {
        if self.colour { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }

    fn put_json(&self, value: &serde_json::Value) {
        self.put(&format!("@nix {value}\n"));
    }

    /// One write per message, so that lines of several processes do not mix. When nobody can
    /// read standard error there is nobody to tell.
    fn put(&self, text: &str) {
        let state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let write = || drop(std::io::stderr().lock().write_all(text.as_bytes()));
        match (&state.live, state.work.iter().find_map(|work| work.bar.as_ref())) {
            (Some(live), _) => live.suspend(write),
            (None, Some(bar)) => bar.suspend(write),
            (None, None) => write(),
        }
    }

    /// May running builds be shown?
    pub fn has_live(&self) -> bool {
        self.bars && !self.is_json() && self.shows(Level::Notice)
    }

    /// A line for programs that follow builds (1.x), whatever the verbosity.
    pub fn trace(&self, text: fmt::Arguments<'_>) {
        self.put(&format!("@ {text}\n"));
    }

    /// Bars that are to be kept below what is written, from now on.
    pub fn set_live(&self, bars: Option<MultiProgress>) {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).live = bars;
    }

    /// In the JSON log: a build runs.
    pub fn begin_build(&self, drv: &str) -> Option<Activity> {
        if !self.is_json() {
            return None;
        }
        let id = {
            let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            state.last_id += 1;
            state.last_id
        };
        self.put_json(&json!({
            "action": "start", "id": id, "level": number(Level::Info), "parent": 0,
            "text": format!("building '{drv}'"), "type": 105, "fields": [drv, "", 1, 1],
        }));
        Some(Activity { id })
    }

    /// A line of a builder's output, as it came.
    pub fn log_line(&self, build: &Activity, line: &str) {
        self.put_json(&json!({"action": "result", "fields": [line], "id": build.id, "type": 101}));
    }

    pub fn end_build(&self, build: &Activity) {
        self.put_json(&json!({"action": "stop", "id": build.id}));
    }

    fn begin(&self, what: &str, total: Option<u64>, unit: Unit) {
        let now = Instant::now();
        let id = {
            let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            state.last_id += 1;
            let id = state.last_id;
            let what = what.to_owned();
            state.work.push(Work { id, what, total, unit, done: 0, since: now, told: now, bar: None });
            id
        };
        if self.is_json() {
            let level = number(Level::Info);
            self.put_json(&json!({"action": "start", "id": id, "level": level, "parent": 0, "text": what, "type": 0}));
        }
    }

    fn advance(&self, more: u64) {
        let told = {
            let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let Some(work) = state.work.last_mut() else { return };
            work.done += more;
            if self.is_json() {
                (work.told.elapsed() >= RESULT_EVERY).then(|| {
                    work.told = Instant::now();
                    (work.id, work.done, work.total)
                })
            } else {
                if self.bars && work.bar.is_none() && work.since.elapsed() >= BAR_AFTER {
                    work.bar = Some(bar(work));
                }
                if let Some(bar) = &work.bar {
                    bar.set_position(work.done);
                }
                None
            }
        };
        if let Some((id, done, total)) = told {
            self.put_result(id, done, total);
        }
    }

    fn end(&self) {
        let ended = {
            let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            state.work.pop()
        };
        let Some(work) = ended else { return };
        if let Some(bar) = work.bar {
            bar.finish_and_clear();
        }
        if self.is_json() {
            self.put_result(work.id, work.done, work.total);
            self.put_json(&json!({"action": "stop", "id": work.id}));
        }
    }

    fn put_result(&self, id: u64, done: u64, total: Option<u64>) {
        let fields = [done, total.unwrap_or(0), 0, 0];
        self.put_json(&json!({"action": "result", "fields": fields, "id": id, "type": 105}));
    }
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Reporter for Terminal {
    fn shows(&self, level: Level) -> bool {
        number(level) <= self.verbosity.load(Ordering::Relaxed)
    }

    /// A message; `warning: ` goes before one of [`Level::Warn`].
    fn message(&self, level: Level, text: fmt::Arguments<'_>) {
        if !self.shows(level) {
            return;
        }
        let warning = level == Level::Warn;
        if self.is_json() {
            let prefix = if warning { "\u{1b}[35;1mwarning:\u{1b}[0m " } else { "" };
            self.put_json(&json!({"action": "msg", "level": number(level), "msg": format!("{prefix}{text}")}));
        } else if warning {
            self.put(&format!("{} {text}\n", self.painted("warning:", WARNING)));
        } else {
            self.put(&format!("{text}\n"));
        }
    }

    fn progress(&self, step: Progress<'_>) {
        match step {
            Progress::Begin { what, total, unit } => self.begin(what, total, unit),
            Progress::Advance(more) => self.advance(more),
            Progress::End => self.end(),
        }
    }
}

/// The number of a level in flags and in the JSON log: 0 to 7.
fn number(level: Level) -> u8 {
    level as u8
}

fn bar(work: &Work) -> ProgressBar {
    let template = match (work.total, work.unit) {
        (Some(_), Unit::Bytes) => {
            "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} ({binary_bytes_per_sec}, {eta})"
        }
        (Some(_), Unit::Paths) => "{msg} [{bar:30}] {pos}/{len} ({eta})",
        (None, Unit::Bytes) => "{spinner} {msg} {binary_bytes} ({binary_bytes_per_sec})",
        (None, Unit::Paths) => "{spinner} {msg} {pos}",
    };
    let style = ProgressStyle::with_template(template).expect("the templates above are well-formed");
    let bar = ProgressBar::with_draw_target(work.total, ProgressDrawTarget::stderr());
    bar.set_style(style.progress_chars("=> "));
    bar.set_message(work.what.clone());
    bar
}

/// Makes a line of a build log fit to be shown.
///
/// Of escape sequences only colours are kept, and these only if wanted; so are line feeds and
/// tabs of control characters. Stdenv marks its phases with private sequences (`ESC [ .. p`, `q`,
/// `s`, `a`, `b`), which mean nothing to a terminal.
pub fn filter_log(line: &str, colours: bool) -> Cow<'_, str> {
    if !line.chars().any(|c| c.is_control() && c != '\n' && c != '\t') {
        return Cow::Borrowed(line);
    }
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find(|c: char| c.is_control() && c != '\n' && c != '\t') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let length = escape_len(from);
        let (sequence, after) = from.split_at(length);
        if colours && sequence.starts_with("\u{1b}[") && sequence.ends_with('m') {
            out.push_str(sequence);
        }
        rest = after;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// The length in bytes of the escape sequence, or the control character, that `text` begins with.
fn escape_len(text: &str) -> usize {
    let mut chars = text.char_indices();
    let Some((_, first)) = chars.next() else { return 0 };
    if first != '\u{1b}' {
        return first.len_utf8();
    }
    match chars.next() {
        // CSI: parameters, then one final character.
        Some((_, '[')) => {
            let last = chars.find(|(_, c)| !matches!(c, '\u{20}'..='\u{3f}'));
            last.map_or(text.len(), |(at, c)| if c.is_ascii() && !c.is_control() { at + c.len_utf8() } else { at })
        }
        // OSC: up to BEL or ESC backslash.
        Some((_, ']')) => match text.find('\u{7}') {
            Some(bell) => bell + 1,
            None => text.find("\u{1b}\\").map_or(text.len(), |end| end + 2),
        },
        Some((at, c)) if c.is_ascii() && !c.is_control() => at + 1,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn s005_private_escapes_are_not_shown() {
        for (line, colour, plain) in [
            ("\u{1b}[3pX \u{1b}[31mY", "X \u{1b}[31mY", "X Y"),
            ("\u{1b}[1a\u{1b}[2b\u{1b}[3q\u{1b}[4sZ", "Z", "Z"),
            ("\u{1b}[38;5;1mred\u{1b}[0m", "\u{1b}[38;5;1mred\u{1b}[0m", "red"),
            ("\u{1b}]8;;http://x\u{7}link\u{1b}]8;;\u{7}", "link", "link"),
            ("\u{1b}]0;title\u{1b}\\x", "x", "x"),
            ("50%\r100%\u{7}", "50%100%", "50%100%"),
            ("a\tb", "a\tb", "a\tb"),
            ("\u{1b}", "", ""),
            ("\u{1b}[", "", ""),
            ("\u{1b}[3é", "é", "é"),
            ("\u{1b}(Bx", "Bx", "Bx"),
        ] {
            assert_eq!(filter_log(line, true), colour, "{line:?}");
            assert_eq!(filter_log(line, false), plain, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_but_colours_gets_through(line in "[\u{1b}\u{7}\\[\\]0-9;mpqé a\r\\\\]{0,20}") {
            let plain = filter_log(&line, false).into_owned();
            prop_assert!(!plain.contains(|c: char| c.is_control()));
            let colour = filter_log(&line, true).into_owned();
            let kept = colour.replace("\u{1b}[", "").contains(|c: char| c.is_control());
            prop_assert!(!kept, "{:?}", colour);
            prop_assert_eq!(filter_log(&colour, false).into_owned(), plain);
        }
    }

    #[test]
    fn levels_have_the_numbers_of_the_log() {
        assert_eq!((number(Level::Error), number(Level::Info), number(Level::Vomit)), (0, 3, 7));
    }
}
