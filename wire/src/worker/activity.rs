//! Activities and what comes of them, as numbers and fields. Source: protocols, section 2.4.

use larder_core::report::{Activity, ActivityResult};

use super::message::Field;

fn texts(texts: &[&str]) -> Vec<Field> {
    texts.iter().map(|text| Field::Text(text.as_bytes().to_vec())).collect()
}

fn bytes(text: &[u8]) -> Vec<Field> {
    vec![Field::Text(text.to_vec())]
}

/// The number of an activity's kind, and its fields.
pub(super) fn start(activity: Activity<'_>) -> (u64, Vec<Field>) {
    match activity {
        Activity::CopyPath { path, from, to } => (100, texts(&[path, from, to])),
        Activity::FileTransfer { uri } => (101, texts(&[uri])),
        Activity::Realise => (102, Vec::new()),
        Activity::CopyPaths => (103, Vec::new()),
        Activity::Builds => (104, Vec::new()),
        Activity::Build { drv, machine } => {
            let mut fields = texts(&[drv, machine]);
            fields.extend([Field::Number(1), Field::Number(1)]);
            (105, fields)
        }
        Activity::Optimise => (106, Vec::new()),
        Activity::VerifyPaths => (107, Vec::new()),
        Activity::Substitute { path, uri } => (108, texts(&[path, uri])),
        Activity::QueryPathInfo { path, uri } => (109, texts(&[path, uri])),
        Activity::PostBuildHook { drv } => (110, texts(&[drv])),
        Activity::BuildWaiting => (111, Vec::new()),
        _ => (0, Vec::new()),
    }
}

/// The number of a result's kind, and its fields; `None` for what has none.
pub(super) fn result(result: ActivityResult<'_>) -> Option<(u64, Vec<Field>)> {
    Some(match result {
        ActivityResult::FileLinked { saved_bytes, blocks } => {
            (100, vec![Field::Number(saved_bytes), Field::Number(blocks)])
        }
        ActivityResult::BuildLogLine(line) => (101, bytes(line)),
        ActivityResult::UntrustedPath(path) => (102, texts(&[path])),
        ActivityResult::CorruptedPath(path) => (103, texts(&[path])),
        ActivityResult::SetPhase(phase) => (104, texts(&[phase])),
        ActivityResult::Progress { done, expected, running, failed } => {
            (105, [done, expected, running, failed].map(Field::Number).to_vec())
        }
        ActivityResult::SetExpected { of, expected } => {
            (106, vec![Field::Number(start(of).0), Field::Number(expected)])
        }
        ActivityResult::PostBuildLogLine(line) => (107, bytes(line)),
        _ => return None,
    })
}

/// The fields of a message, as what they are.
pub(super) struct Fields<'a>(pub(super) &'a [Field]);

impl<'a> Fields<'a> {
    fn number(&self, at: usize) -> u64 {
        match self.0.get(at) {
            Some(Field::Number(number)) => *number,
            _ => 0,
        }
    }

    fn bytes(&self, at: usize) -> &'a [u8] {
        match self.0.get(at) {
            Some(Field::Text(text)) => text,
            _ => &[],
        }
    }

    fn text(&self, at: usize) -> &'a str {
        std::str::from_utf8(self.bytes(at)).unwrap_or_default()
    }

    /// The activity of a kind. What is missing is empty, and other servers may know kinds that we
    /// do not.
    pub(super) fn activity(&self, kind: u64) -> Activity<'a> {
        match kind {
            100 => Activity::CopyPath { path: self.text(0), from: self.text(1), to: self.text(2) },
            101 => Activity::FileTransfer { uri: self.text(0) },
            102 => Activity::Realise,
            103 => Activity::CopyPaths,
            104 => Activity::Builds,
            105 => Activity::Build { drv: self.text(0), machine: self.text(1) },
            106 => Activity::Optimise,
            107 => Activity::VerifyPaths,
            108 => Activity::Substitute { path: self.text(0), uri: self.text(1) },
            109 => Activity::QueryPathInfo { path: self.text(0), uri: self.text(1) },
            110 => Activity::PostBuildHook { drv: self.text(0) },
            111 => Activity::BuildWaiting,
            _ => Activity::Unknown,
        }
    }

    /// The result of a kind, if we know it.
    pub(super) fn result(&self, kind: u64) -> Option<ActivityResult<'a>> {
        Some(match kind {
            100 => ActivityResult::FileLinked { saved_bytes: self.number(0), blocks: self.number(1) },
            101 => ActivityResult::BuildLogLine(self.bytes(0)),
            102 => ActivityResult::UntrustedPath(self.text(0)),
            103 => ActivityResult::CorruptedPath(self.text(0)),
            104 => ActivityResult::SetPhase(self.text(0)),
            105 => ActivityResult::Progress {
                done: self.number(0),
                expected: self.number(1),
                running: self.number(2),
                failed: self.number(3),
            },
            106 => ActivityResult::SetExpected { of: Fields(&[]).activity(self.number(0)), expected: self.number(1) },
            107 => ActivityResult::PostBuildLogLine(self.bytes(0)),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for activity in [
            Activity::Unknown,
            Activity::CopyPath { path: "p", from: "f", to: "t" },
            Activity::FileTransfer { uri: "u" },
            Activity::Realise,
            Activity::CopyPaths,
            Activity::Builds,
            Activity::Build { drv: "d", machine: "m" },
            Activity::Optimise,
            Activity::VerifyPaths,
            Activity::Substitute { path: "p", uri: "u" },
            Activity::QueryPathInfo { path: "p", uri: "u" },
            Activity::PostBuildHook { drv: "d" },
            Activity::BuildWaiting,
        ] {
            let (kind, fields) = start(activity);
            assert_eq!(Fields(&fields).activity(kind), activity);
        }
        for found in [
            ActivityResult::FileLinked { saved_bytes: 1, blocks: 2 },
            ActivityResult::BuildLogLine(b"l\xff"),
            ActivityResult::UntrustedPath("p"),
            ActivityResult::CorruptedPath("p"),
            ActivityResult::SetPhase("x"),
            ActivityResult::Progress { done: 1, expected: 2, running: 3, failed: 4 },
            ActivityResult::SetExpected { of: Activity::FileTransfer { uri: "" }, expected: 9 },
            ActivityResult::PostBuildLogLine(b"l"),
        ] {
            let (kind, fields) = result(found).unwrap();
            assert_eq!(Fields(&fields).result(kind), Some(found));
        }
        // Nonsense is nothing, and no panic.
        assert_eq!(Fields(&[]).activity(105), Activity::Build { drv: "", machine: "" });
        assert_eq!(Fields(&[Field::Number(1)]).result(101), Some(ActivityResult::BuildLogLine(b"")));
        assert_eq!(Fields(&[]).result(999), None);
    }
}
