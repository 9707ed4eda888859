//! What redb does where the file is damaged.
//!
//! redb takes the pages that it reads for those that it wrote. Of a file in which bits have changed
//! it tells by an error as a rule, but in places it relies on what it reads, and panics. Such a panic
//! is an error here like any other. What panics elsewhere is a fault of ours, and goes on.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, resume_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::Once;

use crate::error::{DbError, Nonsense};

thread_local! {
    /// How many calls of [`guarded`] this thread is in.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// The last panic of redb in one of them.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Is this the place of a panic within redb?
fn is_of_redb(info: &PanicHookInfo<'_>) -> bool {
    info.location().is_some_and(|location| location.file().split('/').any(|part| part.starts_with("redb-")))
}

fn text_of(info: &PanicHookInfo<'_>) -> String {
    let text = info.payload_as_str().unwrap_or("it makes no sense");
    // Assertions say what was compared in further lines.
    text.lines().next().unwrap_or_default().to_owned()
}

/// Nothing is printed of the panics that become errors.
fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if DEPTH.get() > 0 && is_of_redb(info) {
                PANIC.set(Some(text_of(info)));
            } else {
                before(info);
            }
        }));
    });
}

/// Runs what reads or writes the file at `path`; after damage, `clean_up` lets go of the handles.
pub(crate) fn guarded<T, E: From<DbError>>(
    path: &Path,
    f: impl FnOnce() -> Result<T, E>,
    clean_up: impl FnOnce(),
) -> Result<T, E> {
    install_hook();
    // A broken promise could only be one between our own values, none of which outlives the panic: the
    // handles are made anew.
    match (catching(f), PANIC.take()) {
        (Ok(result), _) => result,
        (Err(_), Some(detail)) => {
            // What is left of a handle may panic once more.
            let _ = catching(clean_up);
            PANIC.set(None);
            Err(DbError::Damaged { path: path.to_owned(), detail: Nonsense(detail) }.into())
        }
        (Err(panic), None) => resume_unwind(panic),
    }
}

/// Drops a handle, which writes to the file. Nobody is there to hear of damage, and every change that
/// was told as done is durable already.
pub(crate) fn drop_quietly<T>(handle: T) {
    install_hook();
    if let (Err(panic), None) = (catching(|| drop(handle)), PANIC.take()) {
        resume_unwind(panic);
    }
}

fn catching<T>(f: impl FnOnce() -> T) -> std::thread::Result<T> {
    DEPTH.set(DEPTH.get() + 1);
    let outcome = catch_unwind(AssertUnwindSafe(f));
    DEPTH.set(DEPTH.get() - 1);
    outcome
}
