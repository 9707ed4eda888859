//! What people see of builds: one line an event, and on a terminal what runs just now.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use larder_core::report::{Level, Reporter as _};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_realise::driver::Listener;
use larder_realise::job::{Failure, FailureKind, Job};

use crate::args::LogFormat;
use crate::exit::Status;
use crate::terminal::{Activity, Terminal, filter_log};

/// Running builds that are shown, at most.
const MAX_SHOWN: usize = 8;

/// Shows builds on the terminal.
#[derive(Debug)]
pub struct BuildView {
    terminal: Arc<Terminal>,
    dir: StoreDir,
    shows_logs: bool,
    trace: Option<Trace>,
    live: Option<Live>,
    failed: AtomicUsize,
    activities: Mutex<HashMap<StorePath, Activity>>,
}

/// Lines about builds for programs (`--print-build-trace`, 1.x).
#[derive(Debug)]
pub struct Trace {
    pub logs: PathBuf,
    pub compressed: bool,
}

impl Trace {
    /// Where the log of a build goes.
    fn log(&self, drv: &StorePath) -> String {
        let base = drv.to_string();
        let (front, rest) = base.split_at(2);
        let suffix = if self.compressed { ".bz2" } else { "" };
        format!("{}/{front}/{rest}{suffix}", self.logs.display())
    }
}

#[derive(Debug)]
struct Live {
    bars: MultiProgress,
    total: ProgressBar,
    running: Mutex<HashMap<StorePath, ProgressBar>>,
}

/// Is the output of builders shown as it comes?
pub fn shows_logs(terminal: &Terminal, format: LogFormat, no_build_output: bool) -> bool {
    let format_shows = matches!(format, LogFormat::RawWithLogs | LogFormat::BarWithLogs | LogFormat::InternalJson);
    // `--quiet` once leaves the output of builders; twice does not.
    format_shows && !no_build_output && terminal.shows(Level::Notice)
}

impl BuildView {
    pub fn new(terminal: &Arc<Terminal>, dir: &StoreDir, shows_logs: bool, trace: Option<Trace>) -> Self {
        let live = terminal.has_live().then(|| {
            let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(4));
            let total = bars.add(ProgressBar::new(0));
            total.set_style(style("[{pos}/{len}]{msg}"));
            terminal.set_live(Some(bars.clone()));
            Live { bars, total, running: Mutex::default() }
        });
        Self {
            terminal: Arc::clone(terminal),
            dir: dir.clone(),
            shows_logs,
            trace,
            live,
            failed: AtomicUsize::new(0),
            activities: Mutex::default(),
        }
    }
}

impl BuildView {
    /// Shows that something goes on with a path, if there is room.
    fn show(&self, path: &StorePath, text: String) {
        let Some(live) = &self.live else { return };
        let mut running = live.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.len() < MAX_SHOWN {
            let bar = live.bars.insert_before(&live.total, ProgressBar::new_spinner());
            bar.set_style(style("  {msg}  {elapsed}"));
            bar.set_message(text);
            bar.enable_steady_tick(std::time::Duration::from_secs(1));
            running.insert(path.clone(), bar);
        }
    }

    fn unshow(&self, path: &StorePath) {
        let Some(live) = &self.live else { return };
        if let Some(bar) = live.running.lock().unwrap_or_else(PoisonError::into_inner).remove(path) {
            bar.finish_and_clear();
            live.bars.remove(&bar);
        }
    }
}

impl Drop for BuildView {
    fn drop(&mut self) {
        if let Some(live) = &self.live {
            drop(live.bars.clear());
            self.terminal.set_live(None);
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates here are well-formed")
}

impl Listener for BuildView {
    fn started(&self, job: &Job) {
        let drv = &job.drv_path;
        let full = self.dir.full(drv);
        if let Some(trace) = &self.trace {
            let log = trace.log(drv);
            self.terminal.trace(format_args!("build-started {full} - {} {log}", job.drv.system));
        }
        if let Some(activity) = self.terminal.begin_build(&full) {
            self.activities.lock().unwrap_or_else(PoisonError::into_inner).insert(drv.clone(), activity);
        }
        let name = drv.name().as_str();
        self.show(drv, name.strip_suffix(".drv").unwrap_or(name).to_owned());
    }

    fn fetching(&self, path: &StorePath, nar_size_bytes: u64) {
        self.show(path, format!("{} from a cache, {}", path.name(), HumanBytes(nar_size_bytes)));
    }

    fn fetched(&self, path: &StorePath) {
        self.unshow(path);
    }

    fn line(&self, drv: &StorePath, line: &[u8]) {
        if !self.shows_logs {
            return;
        }
        let text = String::from_utf8_lossy(line);
        if let Some(activity) = self.activities.lock().unwrap_or_else(PoisonError::into_inner).get(drv) {
            self.terminal.log_line(activity, &text);
            return;
        }
        let shown = filter_log(&text, self.terminal.has_colour());
        self.terminal.message(Level::Notice, format_args!("{}", expand_tabs(&shown)));
    }

    fn ended(&self, drv: &StorePath, how: Result<(), &Failure>) {
        if self.trace.is_some() {
            let drv = self.dir.display(drv);
            match how {
                Ok(()) => self.terminal.trace(format_args!("build-succeeded {drv} -")),
                Err(failure) => match failure.kind {
                    FailureKind::TimedOut => self.terminal.trace(format_args!("build-failed {drv} - timeout")),
                    FailureKind::Cached => self.terminal.trace(format_args!("build-failed {drv} - cached")),
                    kind => {
                        let status = Status::of_failures(&[kind].into()).code();
                        let text = failure.text.replace('\n', " ");
                        self.terminal.trace(format_args!("build-failed {drv} - {status} {text}"));
                    }
                },
            }
        }
        if let Some(activity) = self.activities.lock().unwrap_or_else(PoisonError::into_inner).remove(drv) {
            self.terminal.end_build(&activity);
        }
        if how.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        self.unshow(drv);
        let Some(live) = &self.live else { return };
        let failed = self.failed.load(Ordering::Relaxed);
        if failed > 0 {
            live.total.set_message(format!(", {failed} failed"));
        }
    }

    fn count(&self, done: usize, total: usize) {
        if let Some(live) = &self.live {
            live.total.set_length(total as u64);
            live.total.set_position(done as u64);
        }
    }

    fn failed(&self, text: &str) {
        self.terminal.error_text(text);
    }
}

/// Tabs as blanks, up to the next column that 8 divides. Colours take no room.
pub fn expand_tabs(text: &str) -> Cow<'_, str> {
    if !text.contains('\t') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let (mut column, mut in_escape) = (0usize, false);
    for c in text.chars() {
        match c {
            '\t' => {
                let blanks = 8 - column % 8;
                out.extend(std::iter::repeat_n(' ', blanks));
                column += blanks;
                continue;
            }
            '\u{1b}' => in_escape = true,
            _ if in_escape => in_escape = c != 'm',
            _ => column += 1,
        }
        out.push(c);
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tabs() {
        for (text, expected) in [
            ("a\tb", "a       b"),
            ("\t", "        "),
            ("12345678\tx", "12345678        x"),
            ("\u{1b}[31ma\u{1b}[0m\tb", "\u{1b}[31ma\u{1b}[0m       b"),
            ("é\tb", "é       b"),
        ] {
            assert_eq!(expand_tabs(text), expected, "{text:?}");
        }
    }
}
