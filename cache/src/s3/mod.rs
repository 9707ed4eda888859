//! Caches in buckets of S3, and of servers that speak like it.
//!
//! The files of a cache are objects of the same names. Requests are ordinary ones of HTTP, with the
//! signature in the URL (version 4), which `rusty-s3` computes and which is made anew for each
//! attempt; who has no keys asks without one, as for a bucket that is open to everybody.
//!
//! Source: protocols, section 5.5; AWS documents "Signature Version 4" and the `aws` files.

mod keys;
mod parts;

use std::time::Duration;

use jiff::Timestamp;
use rusty_s3::{Credentials, UrlStyle, signing};

pub use self::keys::Keys;
pub(crate) use self::parts::put_in_parts;
use crate::client::Method;
use crate::error::CacheError;
use crate::uri::CacheUri;

/// Where buckets are if nothing else is said.
const USUAL_REGION: &str = "us-east-1";

/// For how long a signature is good: only as long as it takes until the server sees it.
const GOOD_FOR: Duration = Duration::from_hours(1);

/// The smallest part that servers take of an upload in parts, and the usual one, in bytes.
pub(crate) const SMALLEST_PART: u64 = 5 << 20;

/// The largest object that can be sent in one request, in bytes.
pub(crate) const LARGEST_IN_ONE: u64 = 5 << 30;

/// A bucket, and the keys to it.
#[derive(Clone)]
pub struct Bucket {
    bucket: rusty_s3::Bucket,
    credentials: Option<Credentials>,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bucket").field("url", &self.bucket.base_url().as_str()).finish_non_exhaustive()
    }
}

impl Bucket {
    /// The bucket `name`, as the parameters of a URI describe it: `region`, `endpoint`, `scheme`,
    /// `profile`.
    pub fn of(name: &str, uri: &CacheUri, keys: &Keys) -> Result<Self, CacheError> {
        let region = uri.parameter("region").filter(|region| !region.is_empty()).unwrap_or(USUAL_REGION);
        if !region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(uri.invalid("'region' is none".to_owned()));
        }
        let scheme = match uri.parameter("scheme").map(str::to_ascii_lowercase).as_deref() {
            None | Some("" | "https") => "https",
            Some("http") => "http",
            Some(_) => return Err(uri.invalid("'scheme' is neither http nor https".to_owned())),
        };
        let endpoint = uri.parameter("endpoint").unwrap_or_default();
        let (endpoint, style) = match endpoint {
            "" => {
                let land = if region.starts_with("cn-") { ".cn" } else { "" };
                // A name with dots would need a certificate that nobody has.
                let style = if name.contains('.') { UrlStyle::Path } else { UrlStyle::VirtualHost };
                (format!("{scheme}://s3.{region}.amazonaws.com{land}"), style)
            }
            whole if whole.contains("://") => (whole.to_owned(), UrlStyle::Path),
            host => (format!("{scheme}://{host}"), UrlStyle::Path),
        };
        let refused = |reason: &dyn std::fmt::Display| uri.invalid(format!("its endpoint '{endpoint}': {reason}"));
        let url = endpoint.parse().map_err(|error| refused(&error))?;
        let bucket = rusty_s3::Bucket::new(url, style, name.to_owned(), region.to_owned());
        let bucket = bucket.map_err(|error| refused(&error))?;
        let profile = uri.parameter("profile").filter(|profile| !profile.is_empty());
        let credentials = keys.of(profile).map_err(|source| CacheError::Keys { uri: uri.shown.clone(), source })?;
        Ok(Self { bucket, credentials })
    }

    /// Where an object is.
    pub fn url(&self, key: &str) -> String {
        self.bucket.object_url(key).into()
    }

    /// A URL of this bucket with a signature, if there are keys.
    pub(crate) fn signed(&self, method: Method, url: &str) -> String {
        self.signed_at(&Timestamp::now(), method, url)
    }

    fn signed_at(&self, now: &Timestamp, method: Method, url: &str) -> String {
        let (Some(keys), Ok(plain)) = (&self.credentials, url.parse::<url::Url>()) else { return url.to_owned() };
        let mut query: Vec<(String, String)> = plain.query_pairs().into_owned().collect();
        query.sort();
        let signed = signing::sign(
            now,
            match method {
                Method::Get => rusty_s3::Method::Get,
                Method::Head => rusty_s3::Method::Head,
                Method::Post => rusty_s3::Method::Post,
                Method::Put => rusty_s3::Method::Put,
                Method::Delete => rusty_s3::Method::Delete,
            },
            plain,
            keys.key(),
            keys.secret(),
            keys.token(),
            self.bucket.region(),
            GOOD_FOR.as_secs(),
            query.iter().map(|(name, value)| (name.as_str(), value.as_str())),
            std::iter::empty(),
        );
        signed.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(uri: &str, keys: &Keys) -> Result<Bucket, CacheError> {
        let uri = CacheUri::parse(uri)?;
        let crate::uri::Location::Bucket(name) = &uri.location else { panic!("no bucket: {uri:?}") };
        Bucket::of(name, &uri, keys)
    }

    #[test]
    fn where_buckets_are() {
        for (uri, url) in [
            ("s3://b", "https://b.s3.us-east-1.amazonaws.com/nar/x.nar"),
            ("s3://b?region=cn-north-1", "https://b.s3.cn-north-1.amazonaws.com.cn/nar/x.nar"),
            ("s3://b.c?region=eu-west-1", "https://s3.eu-west-1.amazonaws.com/b.c/nar/x.nar"),
            ("s3://b?scheme=http&endpoint=h:9000", "http://h:9000/b/nar/x.nar"),
            ("s3://b?endpoint=h.example", "https://h.example/b/nar/x.nar"),
            ("s3://b?endpoint=http://h/", "http://h/b/nar/x.nar"),
        ] {
            assert_eq!(bucket(uri, &Keys::default()).unwrap().url("nar/x.nar"), url, "{uri}");
        }
        for uri in ["s3://b?scheme=ftp", "s3://b?endpoint=ftp://h", "s3://b?region=a/b", "s3://b?endpoint=a b"] {
            bucket(uri, &Keys::default()).unwrap_err();
        }
    }

    #[test]
    fn only_who_has_keys_signs() {
        let open = bucket("s3://b", &Keys::default()).unwrap();
        assert_eq!(open.signed(Method::Get, &open.url("x")), open.url("x"));
        let keys = Keys::from_variables(|name| {
            let value = match name {
                "AWS_ACCESS_KEY_ID" => "id",
                "AWS_SECRET_ACCESS_KEY" => "secret",
                "AWS_SESSION_TOKEN" => "to/ken",
                _ => return None,
            };
            Some(value.into())
        });
        let closed = bucket("s3://b?region=eu-west-1", &keys).unwrap();
        let plain = format!("{}?uploadId=a%2Fb&partNumber=2", closed.url("x"));
        let signed = closed.signed(Method::Put, &plain);
        for part in [
            "X-Amz-Credential=id%2F",
            "%2Feu-west-1%2Fs3%2Faws4_request",
            "X-Amz-Security-Token=to%2Fken",
            "&partNumber=2&uploadId=a%2Fb&X-Amz-Signature=",
        ] {
            assert!(signed.contains(part), "{part}: {signed}");
        }
        assert!(
            signed.starts_with(&closed.url("x"))
                && !signed.contains("secret")
                && !format!("{closed:?}{keys:?}").contains("secret")
        );
    }

    /// URLs that botocore 1.43 has signed.
    #[test]
    fn signatures_are_those_of_others() {
        let now = "2026-01-02T03:04:05Z".parse().unwrap();
        for (uri, token, method, url, more) in [
            (
                "s3://b?region=eu-west-1",
                None,
                Method::Put,
                "https://b.s3.eu-west-1.amazonaws.com/nar/1abc.nar.zst",
                "X-Amz-SignedHeaders=host&\
                 X-Amz-Signature=0da8bf1fc92f63b695482ce200da7c0a6ca94ae3b263df86ff9a73241068aa31",
            ),
            (
                "s3://b?region=eu-west-1&scheme=http&endpoint=127.0.0.1:9000",
                Some("to/ken=="),
                Method::Get,
                "http://127.0.0.1:9000/b/log/x%2By-z%20w.drv?partNumber=2&uploadId=a%2Fb%2Bc",
                "X-Amz-Signature=3b0216a73cd9d006054104bff6fc5a2bb50bd6e9508de31ae9021a63012dec53",
            ),
        ] {
            let keys = Keys::from_variables(|name| {
                let value = match name {
                    "AWS_ACCESS_KEY_ID" => "AKIDEXAMPLE",
                    "AWS_SECRET_ACCESS_KEY" => "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
                    "AWS_SESSION_TOKEN" => token?,
                    _ => return None,
                };
                Some(value.into())
            });
            let signed = bucket(uri, &keys).unwrap().signed_at(&now, method, url);
            let end = signed.split_once("X-Amz-SignedHeaders").unwrap().1;
            assert!(end.ends_with(more.trim_start_matches("X-Amz-SignedHeaders")), "{signed}");
        }
    }
}
