//! Follows a connection's input from head to head, to see how each declares the length of its body.
//!
//! hyper drops the `Content-Length` beside a `Transfer-Encoding` before a service sees the request, so it is looked for
//! in the bytes. Only in heads: a body is its sender's own text, and a proxy's connection may carry requests of strangers
//! ahead of somebody else's webhook.
//!
//! This has to parse the input as hyper does, but need not be trusted to: `framing` compares the two request by request,
//! and where they differ, or this one gives up, the request counts as ambiguous. hyper gives up as well then.

use http::{
    HeaderMap,
    header::{CONTENT_LENGTH, TRANSFER_ENCODING},
};

/// How a head declares the length of its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// Not at all: there is no body.
    Absent,
    /// `Content-Length`.
    Length,
    /// `Transfer-Encoding`.
    Chunked,
    /// Both.
    Both,
}

impl Framing {
    /// What hyper keeps of it, which is never both.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        if headers.contains_key(TRANSFER_ENCODING) {
            Self::Chunked
        } else if headers.contains_key(CONTENT_LENGTH) {
            Self::Length
        } else {
            Self::Absent
        }
    }

    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Absent, _) => other,
            _ if self == other => self,
            _ => Self::Both,
        }
    }
}

/// The position within a connection's input.
#[derive(Debug, Default)]
pub(super) struct Scan {
    place: Place,
    line: Line,
}

#[derive(Debug, Default, Clone, Copy)]
enum Place {
    /// Before a request line; empty lines are skipped there.
    #[default]
    Between,
    /// In the headers.
    Head { framing: Framing, length: u64 },
    /// In a body or a chunk, with this much left.
    Body { left: u64, chunk: bool },
    /// After a chunk's bytes.
    ChunkEnd,
    /// Before a chunk.
    ChunkSize,
    /// After the last chunk.
    Trailers,
    /// Input that hyper would not continue with.
    Lost,
}

impl Scan {
    /// Advances by what was read next, and reports each head that ends in it.
    pub(super) fn advance(&mut self, mut piece: &[u8], mut head: impl FnMut(Framing)) {
        while !piece.is_empty() {
            match self.place {
                Place::Lost => return,
                Place::Body { left, chunk } => {
                    let skipped = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
                    piece = &piece[skipped..];
                    self.place = Place::after(left - skipped as u64, chunk);
                }
                _ => {
                    let Some(newline) = memchr::memchr(b'\n', piece) else {
                        self.line.add(piece);
                        return;
                    };
                    let (line, rest) = piece.split_at(newline);
                    piece = &rest[1..];
                    self.place = if self.line.bytes == 0 {
                        self.place.next(&Text::of(line, line.len(), line.last()), &mut head)
                    } else {
                        self.line.add(line);
                        let place = self.place.next(&self.line.text(), &mut head);
                        self.line.bytes = 0;
                        place
                    };
                }
            }
        }
    }
}

impl Place {
    /// In a body with this much left.
    fn after(left: u64, chunk: bool) -> Self {
        match (left, chunk) {
            (0, true) => Self::ChunkEnd,
            (0, false) => Self::Between,
            _ => Self::Body { left, chunk },
        }
    }

    /// After a line.
    fn next(self, line: &Text<'_>, head: &mut impl FnMut(Framing)) -> Self {
        match self {
            Self::Between if line.is_empty() => self,
            Self::Between => Self::Head { framing: Framing::Absent, length: 0 },
            Self::Head { framing, length } if line.is_empty() => {
                head(framing);
                match framing {
                    Framing::Absent | Framing::Length => Self::after(length, false),
                    Framing::Chunked | Framing::Both => Self::ChunkSize,
                }
            }
            Self::Head { framing, length } => {
                if line.is_header("content-length") {
                    match line.value("content-length").and_then(|value| number(value, 10)) {
                        Some(length) => Self::Head { framing: framing.and(Framing::Length), length },
                        None => Self::Lost,
                    }
                } else if line.is_header("transfer-encoding") {
                    Self::Head { framing: framing.and(Framing::Chunked), length }
                } else {
                    self
                }
            }
            // Between chunks hyper accepts no line that ends without a carriage return.
            _ if !line.carriage_return => Self::Lost,
            Self::ChunkEnd if line.is_empty() => Self::ChunkSize,
            Self::ChunkSize => match line.chunk_size() {
                Some(0) => Self::Trailers,
                Some(size) => Self::Body { left: size, chunk: true },
                None => Self::Lost,
            },
            Self::Trailers if line.is_empty() => Self::Between,
            Self::Trailers => self,
            Self::ChunkEnd | Self::Body { .. } | Self::Lost => Self::Lost,
        }
    }
}

/// As much of a line as is ever examined: a length of twenty digits with its name, and some spaces.
const LINE_KEPT: usize = 64;

/// A line that comes in pieces.
#[derive(Debug)]
struct Line {
    kept: [u8; LINE_KEPT],
    /// Of the whole line so far, saturating.
    bytes: usize,
    last: u8,
}

impl Default for Line {
    fn default() -> Self {
        Self { kept: [0; LINE_KEPT], bytes: 0, last: 0 }
    }
}

impl Line {
    fn add(&mut self, piece: &[u8]) {
        let Some(last) = piece.last() else { return };
        self.last = *last;
        if let Some(room) = self.kept.get_mut(self.bytes..) {
            let taken = room.len().min(piece.len());
            room[..taken].copy_from_slice(&piece[..taken]);
        }
        self.bytes = self.bytes.saturating_add(piece.len());
    }

    fn text(&self) -> Text<'_> {
        Text::of(&self.kept, self.bytes, Some(&self.last))
    }
}

/// A line without its end.
struct Text<'a> {
    kept: &'a [u8],
    /// There was more than was kept.
    cut: bool,
    carriage_return: bool,
}

impl<'a> Text<'a> {
    /// The line that begins with `kept` and has this many bytes.
    fn of(kept: &'a [u8], bytes: usize, last: Option<&u8>) -> Self {
        let carriage_return = last == Some(&b'\r');
        let bytes = bytes - usize::from(carriage_return);
        Self { kept: &kept[..bytes.min(LINE_KEPT)], cut: bytes > LINE_KEPT, carriage_return }
    }

    fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    fn is_header(&self, name: &str) -> bool {
        // hyper accepts no space before the colon.
        self.kept.get(name.len()) == Some(&b':') && self.kept[..name.len()].eq_ignore_ascii_case(name.as_bytes())
    }

    /// What follows the name, if all of it was kept.
    fn value(&self, name: &str) -> Option<&'a [u8]> {
        (!self.cut).then(|| self.kept[name.len() + 1..].trim_ascii())
    }

    /// The digits at the beginning; an extension may follow.
    fn chunk_size(&self) -> Option<u64> {
        let digits = self.kept.iter().position(|byte| !byte.is_ascii_hexdigit());
        match digits {
            Some(end) if matches!(self.kept[end], b' ' | b'\t' | b';') => number(&self.kept[..end], 16),
            None if !self.cut => number(self.kept, 16),
            _ => None,
        }
    }
}

/// Digits only, as hyper reads them.
fn number(digits: &[u8], radix: u32) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |number, byte| {
        let digit = char::from(*byte).to_digit(radix)?;
        number.checked_mul(u64::from(radix))?.checked_add(u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The heads in `pieces`.
    fn heads<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Framing> {
        let (mut scan, mut found) = (Scan::default(), Vec::new());
        for piece in pieces {
            scan.advance(piece, |head| found.push(head));
        }
        found
    }

    fn assert_heads(input: &[u8], wanted: &[Framing]) {
        let shown = String::from_utf8_lossy(input);
        for cut in 0..=input.len() {
            let (before, after) = input.split_at(cut);
            assert_eq!(heads([before, after]), wanted, "cut at {cut} of {shown:?}");
        }
        assert_eq!(heads(input.chunks(1)), wanted, "byte by byte, {shown:?}");
    }

    #[test]
    fn heads_are_told_apart_from_bodies_however_they_are_cut() {
        use Framing::{Absent, Both, Chunked, Length};
        let long = "x".repeat(200);
        let padded = format!("POST / HTTP/1.1\r\ncontent-length:{}1\r\n\r\nx", " ".repeat(40));
        for (input, wanted) in [
            ("GET / HTTP/1.1\r\nhost: x\r\n\r\nGET / HTTP/1.1\r\n\r\n".to_owned(), vec![Absent, Absent]),
            // Empty lines before a request, and lines that end without a carriage return.
            ("\r\n\nGET / HTTP/1.1\nhost: x\n\nGET / HTTP/1.1\n\n".to_owned(), vec![Absent, Absent]),
            ("POST / HTTP/1.1\r\nContent-Length: 17\r\n\r\n\ncontent-length:\nGET / HTTP/1.1\r\n\r\n".to_owned(), vec![Length, Absent]),
            ("POST / HTTP/1.1\r\ncontent-length:4\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\n\r\n".to_owned(), vec![Length, Absent]),
            (
                "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n11;a=b\r\n\ncontent-length:\n\r\n0\r\nt: x\r\n\r\n\
                 POST / HTTP/1.1\r\nCONTENT-LENGTH: 1 \r\n\r\nxGET / HTTP/1.1\r\n\r\n"
                    .to_owned(),
                vec![Chunked, Length, Absent],
            ),
            // A trailer is not a header.
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\ncontent-length: 5\r\n\r\nGET / HTTP/1.1\r\n\r\n"
                    .to_owned(),
                vec![Chunked, Absent],
            ),
            (
                format!(
                    "POST /{long} HTTP/1.1\r\nx-content-length: 3\r\nx: {long}\r\ncontent-lengths: 3\r\n\
                     transfer-encoding: chunked\r\n\r\n0001 ;{long}\r\nx\r\n0\r\n{long}: {long}\r\n\r\nGET / HTTP/1.1\r\n\r\n"
                ),
                vec![Chunked, Absent],
            ),
            (
                "POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\nhiPOST / HTTP/1.1\r\ncontent-length: 2\r\n\
                 transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
                    .to_owned(),
                vec![Length, Both, Absent],
            ),
            ("POST / HTTP/1.1\nTransfer-Encoding: chunked\nContent-Length: 2\n\n".to_owned(), vec![Both]),
            ("POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\nx".to_owned(), vec![Length]),
            (padded, vec![Length]),
        ] {
            assert_heads(input.as_bytes(), &wanted);
        }
    }

    #[test]
    fn after_what_cannot_be_followed_nothing_more_is_told() {
        let rest = "GET / HTTP/1.1\r\n\r\n";
        for lost in [
            "POST / HTTP/1.1\r\ncontent-length: +5\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: 1, 1\r\n\r\nx",
            "POST / HTTP/1.1\r\ncontent-length:\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: 18446744073709551616\r\n\r\n",
            &format!("POST / HTTP/1.1\r\ncontent-length:{}1\r\n\r\nx", " ".repeat(64)),
        ] {
            assert_heads(format!("{lost}{rest}").as_bytes(), &[]);
        }
        for lost in ["x\r\n", "\r\n", "1\nx\r\n", "1\r\nxy\r\n", "10000000000000000\r\n", "0x1\r\n", "0\r\n\n"] {
            let input = format!("POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n{lost}{rest}");
            assert_heads(input.as_bytes(), &[Framing::Chunked]);
        }
    }
}
