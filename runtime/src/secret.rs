//! Secrets: text that no log, error or `Debug` output shows, and where it comes from.

use std::{
    convert::Infallible,
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use crate::{config::Problem, reload::read_text};

/// A secret that is not blank. `Debug` prints `Secret(***)`; there is no `Display` and no serialisation.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Wraps `text` as it is: blanks inside or around it are part of the secret.
    ///
    /// # Errors
    ///
    /// [`Blank`] when there is nothing but white space: with an empty key anybody could sign.
    pub fn new(text: impl Into<Arc<str>>) -> Result<Self, Blank> {
        let text = text.into();
        if text.trim().is_empty() { Err(Blank) } else { Ok(Self(text)) }
    }

    /// The secret itself, for the one place that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// A secret was blank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a secret may not be blank")]
pub struct Blank;

/// The text of a secret setting as given, possibly blank and possibly a list: what clap parses into, so that a secret is
/// never held as a plain `String` that `Debug` would show. [`SecretSource`] makes secrets of it.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(Arc<str>);

impl FromStr for SecretText {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.into()))
    }
}

impl From<&str> for SecretText {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(***)")
    }
}

/// A URL as others may see it: `***` replaces whatever precedes an `@`, and any query and fragment, where people put
/// passwords and keys. Text that is not a URL stays as it is.
#[must_use]
pub fn shown_url(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let (place, more) = rest.find(['?', '#']).map_or((rest, ""), |at| rest.split_at(at));
    let (authority, path) = place.find('/').map_or((place, ""), |at| place.split_at(at));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    // A password containing a slash or the like, or another URL after this one: the parts cannot be told apart.
    let port = host.rsplit_once(':').map_or("", |(_, port)| if port.ends_with(']') { "" } else { port });
    if !port.bytes().all(|byte| byte.is_ascii_digit()) || (place.contains("://") && place.contains('@')) {
        return format!("{scheme}://***");
    }
    let user = if host.len() < authority.len() { "***@" } else { "" };
    let hidden = more.get(..1).map_or(String::new(), |mark| format!("{mark}***"));
    format!("{scheme}://{user}{host}{path}{hidden}")
}

/// Why secrets could not be read. Names the file, never its content.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read, is not UTF-8, or far too large for a secret.
    #[error("cannot read {path}")]
    Io {
        /// The file as configured.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Nothing was given.
    #[error("no secret was given")]
    Empty,
    /// A file that is named is meant to hold a secret.
    #[error("{path} holds no secret")]
    Blank {
        /// The file as configured.
        path: PathBuf,
    },
}

/// Where secrets come from: the setting `NAME` itself, or the file that `NAME_FILE` names.
#[derive(Debug, Clone)]
pub enum SecretSource {
    /// Given as a value.
    Value(SecretText),
    /// Given as several values, in which commas belong to the value.
    Values(Arc<[Secret]>),
    /// Read from a file, and read again when it changes. The path is opened anew each time, because a projected
    /// Kubernetes secret is updated by swapping a symbolic link (W5).
    File(PathBuf),
}

impl SecretSource {
    /// Chooses between `NAME` and `NAME_FILE`. Blank text counts as unset, so that `NAME=` in a composed environment
    /// switches a setting off.
    ///
    /// # Errors
    ///
    /// Both given: which one applies would be a guess.
    pub fn choose(
        name: &'static str,
        value: Option<SecretText>,
        file: Option<PathBuf>,
    ) -> Result<Option<Self>, Problem> {
        let value = value.filter(|text| !list(&text.0).is_empty());
        let file = file.filter(|path| !path.as_os_str().is_empty());
        match (value, file) {
            (Some(_), Some(path)) => {
                Err(Problem::new(name, format!("given as a value and as {name}_FILE ({}): keep one", path.display())))
            }
            (Some(value), None) => Ok(Some(Self::Value(value))),
            (None, Some(path)) => Ok(Some(Self::File(path))),
            (None, None) => Ok(None),
        }
    }

    /// The file that may change, if the source is a file.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Value(_) | Self::Values(_) => None,
            Self::File(path) => Some(path),
        }
    }

    /// Reads a list separated by commas or lines, several secrets being live at once while one is replaced (W5). Blanks are
    /// dropped; the list is never empty.
    ///
    /// # Errors
    ///
    /// The file cannot be read or holds no secret.
    pub fn read_list(&self) -> Result<Vec<Secret>, ReadError> {
        let secrets = match self {
            Self::Value(text) => list(&text.0),
            Self::Values(secrets) => secrets.to_vec(),
            Self::File(path) => list(&read(path)?),
        };
        match self {
            Self::File(path) if secrets.is_empty() => Err(ReadError::Blank { path: path.clone() }),
            _ if secrets.is_empty() => Err(ReadError::Empty),
            _ => Ok(secrets),
        }
    }

    /// Reads one secret, in which commas belong to the value; of several, the first.
    ///
    /// # Errors
    ///
    /// The file cannot be read or holds no secret.
    pub fn read_one(&self) -> Result<Secret, ReadError> {
        match self {
            Self::Value(text) => Ok(Secret(text.0.clone())),
            Self::Values(secrets) => secrets.first().cloned().ok_or(ReadError::Empty),
            Self::File(path) => Secret::new(read(path)?).map_err(|Blank| ReadError::Blank { path: path.clone() }),
        }
    }
}

/// Parses the path of a `NAME_FILE` setting; an empty one counts as not set, like a blank `NAME`. For clap's
/// `value_parser`, whose own parser of paths refuses it.
///
/// # Errors
///
/// None.
pub fn file(text: &str) -> Result<PathBuf, Infallible> {
    Ok(PathBuf::from(text))
}

/// The secrets in `text`, separated by commas or lines, trimmed, without the blank ones. No secret spans two lines:
/// otherwise a file with one secret per line would be read as a single secret that matches nothing, in place of those that
/// work.
fn list(text: &str) -> Vec<Secret> {
    text.split([',', '\n', '\r'])
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| Secret(part.into()))
        .collect()
}

/// The file's text without the byte order mark that some editors put at its beginning, and without the one newline that
/// they and `echo` leave at its end.
fn read(path: &Path) -> Result<String, ReadError> {
    let mut text = read_text(path).map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_url_is_shown_without_user_query_and_fragment() {
        for (url, shown) in [
            ("http://app:3000/hook", "http://app:3000/hook"),
            ("http://app:3000/hook?key=hunter2", "http://app:3000/hook?***"),
            ("https://app?hunter2@host/x", "https://app?***"),
            ("https://app/#hunter2", "https://app/#***"),
            ("http://user:hunter2@app/hook?a=hunter2#b", "http://***@app/hook?***"),
            ("http://hunter2@x@[::1]:80/", "http://***@[::1]:80/"),
            ("http://[fe80::a]/@me", "http://[fe80::a]/@me"),
            ("http://user:hunter2/x@app/", "http://***"),
            ("http://user:hunter2?x@app/", "http://***"),
            ("http://one:1,http://two:2", "http://one:1,http://two:2"),
            ("http://one:1,http://user:hunter2@two:2", "http://***"),
            ("unix:/run/a.sock?", "unix:/run/a.sock?"),
            ("5m", "5m"),
        ] {
            assert_eq!(shown_url(url), shown);
        }
    }

    #[test]
    fn nothing_prints_a_secret() {
        let secret = Secret::new("whsec_abc").unwrap();
        let text = SecretText::from("whsec_abc");
        let source = SecretSource::Value(text.clone());
        for shown in [format!("{secret:?}"), format!("{text:?}"), format!("{source:?}"), format!("{secret:#?}")] {
            assert!(!shown.contains("abc"), "{shown}");
        }
        assert_eq!(secret.expose(), "whsec_abc");
    }

    #[test]
    fn blank_secrets_are_refused() {
        for text in ["", " ", "\n", "\t "] {
            assert_eq!(Secret::new(text), Err(Blank), "{text:?}");
        }
        for text in ["", "  ", ",", " , ,"] {
            assert!(SecretSource::choose("X", Some(text.into()), None).unwrap().is_none(), "{text:?}");
        }
    }

    #[test]
    fn lists_drop_blanks_and_keep_order() {
        let source = SecretSource::choose("X", Some(" a, ,b,,c ".into()), None).unwrap().unwrap();
        let secrets = source.read_list().unwrap();
        assert_eq!(secrets.iter().map(Secret::expose).collect::<Vec<_>>(), ["a", "b", "c"]);
    }

    #[test]
    fn w5_a_file_may_have_a_secret_on_each_line() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"old\r\n\nnew, newer\n").unwrap();
        let source = SecretSource::choose("X", None, Some(file.path().to_owned())).unwrap().unwrap();
        let secrets = source.read_list().unwrap();
        assert_eq!(secrets.iter().map(Secret::expose).collect::<Vec<_>>(), ["old", "new", "newer"]);
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_secret() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all("\u{feff}first\nsecond\n".as_bytes()).unwrap();
        let source = SecretSource::choose("X", None, Some(file.path().to_owned())).unwrap().unwrap();
        let secrets = source.read_list().unwrap();
        assert_eq!(secrets.iter().map(Secret::expose).collect::<Vec<_>>(), ["first", "second"]);
        assert_eq!(source.read_one().unwrap().expose(), "first\nsecond");
    }

    #[test]
    fn several_values_keep_their_commas() {
        let source = SecretSource::Values([Secret::new("a,b").unwrap(), Secret::new("c").unwrap()].into());
        let secrets = source.read_list().unwrap();
        assert_eq!(secrets.iter().map(Secret::expose).collect::<Vec<_>>(), ["a,b", "c"]);
        assert_eq!(source.read_one().unwrap().expose(), "a,b");
        assert!(matches!(SecretSource::Values([].into()).read_list(), Err(ReadError::Empty)));
    }

    #[test]
    fn a_file_loses_one_newline_and_a_blank_one_is_an_error() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let source = SecretSource::choose("X", None, Some(file.path().to_owned())).unwrap().unwrap();
        assert!(matches!(source.read_list(), Err(ReadError::Blank { .. })));
        assert!(matches!(source.read_one(), Err(ReadError::Blank { .. })));
        file.write_all(b"one,two\r\n").unwrap();
        assert_eq!(source.read_one().unwrap().expose(), "one,two");
        assert_eq!(source.read_list().unwrap().len(), 2);
        drop(file);
        assert!(matches!(source.read_list(), Err(ReadError::Io { .. })));
    }

    #[test]
    fn a_file_that_is_no_secrets_is_refused_and_says_why() {
        let why = |content: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(content).unwrap();
            let source = SecretSource::choose("X", None, Some(file.path().to_owned())).unwrap().unwrap();
            let (list, one) = (source.read_list().unwrap_err(), source.read_one().unwrap_err());
            assert_eq!(list.to_string(), one.to_string());
            let shown = format!("{list:?} {}", crate::chain::Chain(&list));
            assert!(!shown.contains("hunter2") && !shown.contains("104, 117, 110"), "{shown}");
            shown
        };
        assert!(why(&vec![b'x'; (4 << 20) + 1]).contains("larger than 4 MiB"));
        assert!(why(b"hunter2\xff").contains("utf-8"));
    }

    #[test]
    fn value_and_file_together_are_a_problem() {
        let problem = SecretSource::choose("X", Some("s3cret".into()), Some("/run/x".into())).unwrap_err();
        assert!(problem.to_string().contains("X_FILE"));
        assert!(!problem.to_string().contains("s3cret"));
    }
}
