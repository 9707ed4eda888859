//! Where the files of a cache are: on a disk, behind a web server, or in a bucket of S3.

use std::io::Read;
use std::sync::Arc;

use crate::client;
use crate::client::{Ask, Client, Contents, Download, Payload};
use crate::compress::Method;
use crate::error::{CacheError, DownloadError};
use crate::files::{Folder, is_inside};
use crate::s3::{Bucket, LARGEST_IN_ONE, SMALLEST_PART, put_in_parts};
use crate::uri::{CacheUri, Location, host};

/// The file in which a cache tells of itself, and its longest length in bytes.
pub(crate) const CACHE_INFO: &str = "nix-cache-info";
pub(crate) const CACHE_INFO_MAX: u64 = 64 << 10;

/// Where the files of a cache are.
#[derive(Debug)]
pub(crate) enum Place {
    Folder(Folder),
    Web(Web),
}

/// What web servers say of whom they let in, and what is not there. Where one may not list, what is
/// not there is forbidden.
const ABSENT: [u16; 5] = [401, 403, 404, 407, 410];

impl Place {
    pub(crate) fn of(uri: &CacheUri, client: &Arc<Client>) -> Result<Self, CacheError> {
        let base = match &uri.location {
            Location::Folder(path) => return Ok(Self::Folder(Folder::new(path.clone(), uri.shown.clone()))),
            Location::Http(base) => Base::Url(base.clone()),
            Location::Bucket(name) => Base::Bucket(Arc::new(Bucket::of(name, uri, &client.options().keys)?)),
        };
        let token = uri.parameter("token").map(|token| format!("Bearer {token}"));
        let part_bytes = match uri.size("buffer-size")? {
            None => SMALLEST_PART,
            Some(bytes) if bytes < SMALLEST_PART => {
                return Err(uri.invalid(format!("'buffer-size' is less than {SMALLEST_PART}, the smallest part")));
            }
            Some(bytes) => bytes,
        };
        Ok(Self::Web(Web {
            client: Arc::clone(client),
            uri: uri.shown.clone(),
            authorization: uri.authorization.clone().or(token),
            parts_from: if uri.flag("multipart-upload")?.unwrap_or(false) { part_bytes } else { LARGEST_IN_ONE },
            part_bytes,
            base,
        }))
    }

    /// The contents of a file, with encodings of the server undone; `None` if there is none.
    pub(crate) fn open(&self, name: &str, takes_encodings: bool) -> Result<Option<Box<dyn Read + Send>>, CacheError> {
        match self {
            Self::Folder(folder) => {
                let opened = folder.open(name)?;
                Ok(opened.map(|(file, _)| -> Box<dyn Read + Send> { Box::new(file) }))
            }
            Self::Web(web) => web.fetch(&Ask { takes_encodings, ..web.ask(name)? }),
        }
    }

    /// A file that is read into memory; `None` if there is none.
    pub(crate) fn small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, CacheError> {
        let Some(file) = self.open(name, true)? else { return Ok(None) };
        let mut text = Vec::new();
        file.take(limit + 1).read_to_end(&mut text).map_err(|error| self.reading(name, error))?;
        if text.len() as u64 > limit {
            return Err(CacheError::TooLong { uri: self.uri().to_owned(), name: name.to_owned(), limit });
        }
        Ok(Some(text))
    }

    /// Is there such a file?
    pub(crate) fn has(&self, name: &str) -> Result<bool, CacheError> {
        match self {
            Self::Folder(folder) => Ok(folder.open(name)?.is_some()),
            Self::Web(web) => web.has(name),
        }
    }

    /// As people see it.
    pub(crate) fn uri(&self) -> &str {
        match self {
            Self::Folder(folder) => folder.uri(),
            Self::Web(web) => &web.uri,
        }
    }

    fn reading(&self, name: &str, error: std::io::Error) -> CacheError {
        CacheError::from_io(error).unwrap_or_else(|source| match self {
            Self::Folder(folder) => folder.reading(name, source),
            Self::Web(web) => CacheError::Decompress { uri: web.uri.clone(), name: name.to_owned(), source },
        })
    }
}

/// Files behind a web server.
#[derive(Debug)]
pub(crate) struct Web {
    client: Arc<Client>,
    base: Base,
    uri: String,
    /// Who asks, for the cache's own host.
    authorization: Option<String>,
    /// Files that are longer (bytes) are sent to a bucket in parts of so many bytes.
    parts_from: u64,
    part_bytes: u64,
}

#[derive(Debug)]
enum Base {
    /// Without a slash at the end.
    Url(String),
    Bucket(Arc<Bucket>),
}

impl Web {
    pub(crate) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// How to ask for a file: of the cache, or elsewhere if its name says so.
    fn ask(&self, name: &str) -> Result<Ask, CacheError> {
        let outside = || CacheError::Outside { uri: self.uri.clone(), name: name.to_owned() };
        if name.starts_with("http://") || name.starts_with("https://") {
            // A password is for the cache's own host, and a host is told nothing that another's is for.
            let own = matches!(&self.base, Base::Url(base) if host(base) == host(name));
            let authorization = self.authorization.clone().filter(|_| own);
            return Ok(Ask { url: name.to_owned(), authorization, ..Ask::default() });
        }
        if name.contains("://") || name.contains(['\n', '\r', ' ']) {
            return Err(outside());
        }
        let name = name.trim_start_matches('/');
        match &self.base {
            Base::Url(base) => {
                let authorization = self.authorization.clone();
                Ok(Ask { url: format!("{base}/{name}"), authorization, ..Ask::default() })
            }
            // What leads upwards in a bucket leads to another one.
            Base::Bucket(_) if !is_inside(name) => Err(outside()),
            Base::Bucket(bucket) => {
                Ok(Ask { url: bucket.url(name), bucket: Some(Arc::clone(bucket)), ..Ask::default() })
            }
        }
    }

    fn fetch(&self, ask: &Ask) -> Result<Option<Box<dyn Read + Send>>, CacheError> {
        match self.client.ask(ask) {
            Ok(download) => decoded(download, &ask.url).map(Some),
            Err(DownloadError::Status { code, .. }) if ABSENT.contains(&code) => Ok(None),
            Err(source) => Err(failed(ask, source)),
        }
    }

    /// What a program behind a name answers; `None` if there is none.
    pub(crate) fn post(&self, name: &str, payload: Payload) -> Result<Option<Box<dyn Read + Send>>, CacheError> {
        let (method, payload) = (client::Method::Post, Some(payload));
        self.fetch(&Ask { method, takes_encodings: true, payload, ..self.ask(name)? })
    }

    fn has(&self, name: &str) -> Result<bool, CacheError> {
        let ask = Ask { method: client::Method::Head, ..self.ask(name)? };
        match self.client.tell(&ask) {
            Ok(()) => Ok(true),
            Err(DownloadError::Status { code, .. }) if ABSENT.contains(&code) => Ok(false),
            Err(source) => Err(failed(&ask, source)),
        }
    }

    /// Writes a file.
    pub(crate) fn put(&self, name: &str, payload: Payload) -> Result<(), CacheError> {
        let is_long = payload.size_bytes() > self.parts_from && matches!(payload.contents, Contents::File { .. });
        let ask = Ask { method: client::Method::Put, payload: Some(payload), ..self.ask(name)? };
        if is_long && ask.bucket.is_some() {
            return put_in_parts(&self.client, &ask, self.part_bytes);
        }
        self.client.tell(&ask).map_err(|source| match source {
            DownloadError::Stopped => CacheError::Interrupted,
            source => CacheError::Upload { url: ask.url.clone(), source },
        })
    }
}

fn failed(ask: &Ask, source: DownloadError) -> CacheError {
    match source {
        DownloadError::Stopped => CacheError::Interrupted,
        source => CacheError::Download { url: ask.url.clone(), source },
    }
}

/// The body of an answer as it was before the server encoded it.
fn decoded(download: Download, url: &str) -> Result<Box<dyn Read + Send>, CacheError> {
    let Some(encoding) = download.encoding().map(str::to_owned) else { return Ok(Box::new(download)) };
    let failed = |source| CacheError::Download { url: url.to_owned(), source };
    let method = Method::of_encoding(&encoding).ok_or_else(|| failed(DownloadError::Encoding(encoding)))?;
    method.decoder(download).map_err(|source| failed(DownloadError::Cut { at: 0, source }))
}
