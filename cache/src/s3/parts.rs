//! Uploads in parts: of what is larger than one request may be, and where it is asked for.
//!
//! Of the XML in between two words are read and one list is written. Servers of S3 differ in the
//! namespaces of that, so a word is what stands between its tags.

use std::io::Read as _;
use std::sync::Arc;

use crate::client::{Ask, Client, Contents, Method, Payload};
use crate::error::{AnswerError, CacheError};
use crate::parallel::in_parallel;

/// Parts of one object, at most.
const MOST_PARTS: u64 = 10_000;

/// Parts that are sent at once.
const AT_ONCE: usize = 4;

/// Bytes of an answer, at most.
const ANSWER_MAX: u64 = 1 << 20;

/// Sends a file to where `whole` would put it, in parts of so many bytes, or more if there would be
/// too many. Nothing is left of it on the server if that fails, as far as it can still be told.
pub(crate) fn put_in_parts(client: &Arc<Client>, whole: &Ask, part_bytes: u64) -> Result<(), CacheError> {
    let failed = |source| CacheError::Upload { url: whole.url.clone(), source };
    let (Some(_), Some(Payload { contents: Contents::File { file, from, size_bytes }, kind, encoding })) =
        (&whole.bucket, &whole.payload)
    else {
        return client.tell(whole).map_err(failed);
    };
    let part_bytes = part_bytes.max(size_bytes.div_ceil(MOST_PARTS));
    let url = |query: &[(&str, &str)]| match url::Url::parse(&whole.url) {
        Ok(mut url) => url.query_pairs_mut().extend_pairs(query).finish().to_string(),
        Err(_) => whole.url.clone(),
    };
    let odd = |source| CacheError::UploadAnswer { url: whole.url.clone(), source };
    let text_of = |ask: &Ask| {
        let mut text = String::new();
        let answer = client.ask(ask).map_err(failed)?;
        let read = answer.take(ANSWER_MAX).read_to_string(&mut text);
        read.map_err(|error| CacheError::from_io(error).unwrap_or_else(|error| odd(AnswerError::Read(error))))?;
        Ok::<_, CacheError>(text)
    };
    let nothing = Payload { encoding: *encoding, ..Payload::bytes(kind, *b"") };
    let begin = Ask { method: Method::Post, url: url(&[("uploads", "1")]), payload: Some(nothing), ..whole.clone() };
    let begun = text_of(&begin)?;
    let id = between(&begun, "UploadId").ok_or_else(|| odd(AnswerError::NoUpload))?;
    let sent = (|| {
        let numbers: Vec<u64> = (0..size_bytes.div_ceil(part_bytes).max(1)).collect();
        let tags = in_parallel(AT_ONCE, &numbers, |number| {
            let (at, number) = (number * part_bytes, u16::try_from(number + 1).unwrap_or(u16::MAX));
            let size_bytes = part_bytes.min(size_bytes - at);
            let contents = Contents::File { file: Arc::clone(file), from: from + at, size_bytes };
            let part = Ask {
                method: Method::Put,
                url: url(&[("partNumber", &number.to_string()), ("uploadId", id)]),
                payload: Some(Payload { contents, kind, encoding: None }),
                ..whole.clone()
            };
            let answer = client.ask(&part).map_err(failed)?;
            answer.tag().map(str::to_owned).ok_or_else(|| odd(AnswerError::NoTag { number }))
        });
        let tags = tags.into_iter().collect::<Result<Vec<String>, _>>()?;
        let body = list_of(&tags);
        let end = Ask {
            method: Method::Post,
            url: url(&[("uploadId", id)]),
            payload: Some(Payload::bytes("application/xml", body.into_bytes())),
            ..whole.clone()
        };
        // The server may say that all is well before it knows.
        let answer = text_of(&end)?;
        // What was put together has a tag; how the answer is called is not the same everywhere.
        if answer.contains("<ETag>") {
            return Ok(());
        }
        let why = between(&answer, "Message").unwrap_or("the answer does not say why");
        Err(odd(AnswerError::Refused(why.to_owned())))
    })();
    if sent.is_err() {
        let abort = Ask { method: Method::Delete, url: url(&[("uploadId", id)]), payload: None, ..whole.clone() };
        // What went wrong first is what counts.
        let _ = client.tell(&abort);
    }
    sent
}

/// The text between two tags; `None` as well if there is more than text.
fn between<'a>(answer: &'a str, tag: &str) -> Option<&'a str> {
    let rest = answer.split_once(&format!("<{tag}>"))?.1;
    let (text, _) = rest.split_once(&format!("</{tag}>"))?;
    (!text.is_empty() && !text.contains(['<', '&'])).then_some(text)
}

/// The parts that make the whole, by what the server calls them.
fn list_of(tags: &[String]) -> String {
    let parts = tags.iter().enumerate().map(|(n, tag)| {
        let tag = tag.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
        format!("<Part><PartNumber>{}</PartNumber><ETag>{tag}</ETag></Part>", n + 1)
    });
    let name = "CompleteMultipartUpload";
    format!("<{name} xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{}</{name}>", parts.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_xml() {
        let answer = "<?xml version=\"1.0\"?><X xmlns=\"y\"><UploadId>2~a-b</UploadId><Empty></Empty></X>";
        assert_eq!(between(answer, "UploadId"), Some("2~a-b"));
        for tag in ["Empty", "Other", "X"] {
            assert_eq!(between(answer, tag), None, "{tag}");
        }
        let list = list_of(&["\"one\"".to_owned(), "a&b".to_owned()]);
        assert!(list.contains("<PartNumber>1</PartNumber><ETag>&quot;one&quot;</ETag>"), "{list}");
        assert!(list.contains("<PartNumber>2</PartNumber><ETag>a&amp;b</ETag></Part></Comp"), "{list}");
    }
}
