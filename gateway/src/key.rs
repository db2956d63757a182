//! An event's name (G4): read from the verified body, made to fit the contract, and the same for every delivery.
//!
//! The body is parsed once and only as far as needed; everything else in it is checked to be JSON and skipped. It has to
//! be one JSON object in UTF-8 without a byte order mark and without anything after it, at most [`DEPTH_MAX`] levels
//! deep.

use std::{borrow::Cow, fmt};

use oncegate_api::limits::{EVENT_ID_BYTES_MAX, EVENT_TYPE_BYTES_MAX};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

/// Levels of nesting in a body (W13): as many as serde_json permits where it recurses.
pub const DEPTH_MAX: usize = 128;

/// The type of an event that names none.
const TYPE_UNKNOWN: &str = "unknown";

/// The most members that any provider's events are named by.
const MEMBERS_MAX: usize = 8;

/// Members of a body as paths of names, none of which leads through the end of another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paths(&'static [&'static [&'static str]]);

impl Paths {
    /// At most [`MEMBERS_MAX`], which the compiler checks where this makes a constant.
    pub(crate) const fn new(paths: &'static [&'static [&'static str]]) -> Self {
        assert!(paths.len() <= MEMBERS_MAX, "there is room for eight members");
        Self(paths)
    }
}

/// Where the event's name stands in the body. Members are given by their index in `paths`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Members {
    pub(crate) paths: Paths,
    /// The parts of the key, in order. Each part is the first of its members that is there. Empty where the key comes from
    /// a signed header.
    pub(crate) key: &'static [&'static [usize]],
    /// The part that tells one event from another. Without it the other parts would give many events the same name, and all
    /// but the first would be swallowed as duplicates.
    pub(crate) naming: usize,
    /// The id that the provider itself gives the event, if it gives any.
    pub(crate) sent_id: &'static [usize],
    /// The type.
    pub(crate) event_type: &'static [usize],
    /// What the type is by the event's shape, where none is sent. Also in the key, if the type is a part of that.
    pub(crate) shape: Option<Shape>,
}

/// A member that events of one type alone have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) member: usize,
    pub(crate) event_type: &'static str,
}

impl Members {
    fn in_key(&self, index: usize) -> bool {
        self.key.iter().any(|part| part.contains(&index)) || self.shape.is_some_and(|shape| shape.member == index)
    }

    /// The type by the event's shape.
    fn shape(&self, found: &Found<'_>) -> Option<&'static str> {
        let shape = self.shape?;
        first(found, &[shape.member]).map(|_| shape.event_type)
    }
}

/// An event's name in the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// 1 to [`EVENT_ID_BYTES_MAX`] bytes of 0x21 to 0x7E.
    pub event_id: String,
    /// 1 to [`EVENT_TYPE_BYTES_MAX`] bytes of 0x21 to 0x7E.
    pub event_type: String,
}

/// An event's id and type exactly as its provider sent them, if it sent them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) event_id: Option<String>,
    pub(crate) event_type: Option<String>,
}

/// The body names no event: it is not one JSON object, or names it twice. Answered with 400 (G4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the body is not one JSON object that names its event once")]
pub struct MalformedBody;

/// Names the event. `signed_id` is its id, if a signed header carries it. `digest` computes the SHA-256 of `body`, and is
/// called only if that becomes the name.
pub(crate) fn identify(
    members: &Members,
    signed_id: Option<&str>,
    body: &[u8],
    digest: impl Fn() -> [u8; 32],
) -> Result<Identity, MalformedBody> {
    let found = read(members, body)?;
    let event_id = match signed_id {
        Some(id) if fits(id, EVENT_ID_BYTES_MAX) => id.to_owned(),
        Some(_) => hashed(digest()),
        None => event_id(members, &found, digest),
    };
    let event_type = event_type(first(&found, members.event_type), members.shape(&found));
    Ok(Identity { event_id, event_type })
}

/// The provider's own id and type of the event, for people only.
pub(crate) fn sent(members: &Members, signed_id: Option<&str>, body: &[u8]) -> Result<Sent, MalformedBody> {
    let found = read(members, body)?;
    let text = |indices: &[usize]| first(&found, indices).map(|sent| sent.text.clone().into_owned());
    Ok(Sent {
        event_id: signed_id.map(str::to_owned).or_else(|| text(members.sent_id)),
        event_type: text(members.event_type),
    })
}

/// The members' texts.
fn read<'a>(members: &Members, body: &'a [u8]) -> Result<Found<'a>, MalformedBody> {
    let body = std::str::from_utf8(body).map_err(|_| MalformedBody)?;
    // serde_json skips what is not asked for without recursion, and so without a limit on depth. Most bodies have fewer
    // brackets than the limit in all, and need no closer look.
    let may_be_deep = memchr::memchr2_iter(b'{', b'[', body.as_bytes()).nth(DEPTH_MAX).is_some();
    if may_be_deep && !depth_within(body.as_bytes(), DEPTH_MAX) {
        return Err(MalformedBody);
    }
    let mut found: Found<'a> = [const { None }; MEMBERS_MAX];
    let mut json = serde_json::Deserializer::from_str(body);
    let top = Level { members, path: Path::TOP, found: &mut found };
    top.deserialize(&mut json).map_err(|_| MalformedBody)?;
    json.end().map_err(|_| MalformedBody)?;
    Ok(found)
}

/// The first of the members that is there and is not empty.
fn first<'f, 'a>(found: &'f Found<'a>, indices: &[usize]) -> Option<&'f Text<'a>> {
    indices.iter().find_map(|&index| found[index].as_ref().filter(|found| !found.text.is_empty()))
}

/// The parts joined by `:`, a missing one empty. A key that the contract does not permit, or that lacks the part that tells
/// events apart, is replaced by the digest of the body: then deliveries are duplicates only if they are identical.
fn event_id(members: &Members, found: &Found<'_>, digest: impl Fn() -> [u8; 32]) -> String {
    let mut id = String::new();
    let (mut named, mut readable) = (false, true);
    for (index, part) in members.key.iter().enumerate() {
        if index > 0 {
            id.push(':');
        }
        if let Some(part) = first(found, part) {
            id.push_str(&part.text);
            named |= index == members.naming;
            readable &= part.readable;
        } else if let Some(shape) = members.shape(found).filter(|_| *part == members.event_type) {
            id.push_str(shape);
        }
    }
    if named && readable && fits(&id, EVENT_ID_BYTES_MAX) { id } else { hashed(digest()) }
}

/// The type as sent; without one that of the event's shape, or `unknown`. A type that the contract does not permit becomes the
/// digest of its text, which keeps different types apart.
fn event_type(sent: Option<&Text<'_>>, shape: Option<&str>) -> String {
    match sent {
        None => shape.unwrap_or(TYPE_UNKNOWN).to_owned(),
        Some(sent) if sent.readable && fits(&sent.text, EVENT_TYPE_BYTES_MAX) => sent.text.clone().into_owned(),
        Some(sent) => hashed(Sha256::digest(sent.text.as_bytes()).into()),
    }
}

fn fits(text: &str, bytes_max: usize) -> bool {
    (1..=bytes_max).contains(&text.len()) && text.bytes().all(|byte| (0x21..=0x7E).contains(&byte))
}

fn hashed(digest: [u8; 32]) -> String {
    format!("sha256:{}", hex::encode(digest))
}

/// Whether brackets outside strings nest at most `max` deep. Meaningless for what is not JSON.
fn depth_within(json: &[u8], max: usize) -> bool {
    let mut depth = 0_usize;
    let mut rest = json;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'{' | b'[' => {
                depth += 1;
                if depth > max {
                    return false;
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => loop {
                match memchr::memchr2(b'"', b'\\', rest) {
                    None => return true,
                    Some(at) if rest[at] == b'"' => {
                        rest = &rest[at + 1..];
                        break;
                    }
                    // Skips the backslash and what it escapes.
                    Some(at) => rest = rest.get(at + 2..).unwrap_or_default(),
                }
            },
            _ => {}
        }
    }
    true
}

/// The texts of the members found so far. One that is there but has no text (null, true, an object, an array) counts as
/// missing.
type Found<'a> = [Option<Text<'a>>; MEMBERS_MAX];

/// The text of a member, or a member's name.
struct Text<'a> {
    text: Cow<'a, str>,
    /// False for a string with half a surrogate pair: it is valid JSON (RFC 8259, section 8.2), so the body is not refused
    /// for it, but it is no text. `text` is then what stands between the quotes, which no name permits.
    readable: bool,
}

/// The member names from the root to here.
#[derive(Clone, Copy)]
struct Path<'p> {
    names: &'p [&'static str],
}

impl Path<'_> {
    const TOP: Self = Self { names: &[] };

    /// What follows on `path` after these names, if it begins with them.
    fn rest<'m>(&self, path: &'m [&'static str]) -> Option<&'m [&'static str]> {
        path.strip_prefix(self.names)
    }
}

/// One object that paths lead through.
struct Level<'p, 'f, 'a> {
    members: &'p Members,
    path: Path<'p>,
    found: &'f mut Found<'a>,
}

/// What a member of the object is wanted for.
enum Wanted {
    Nothing,
    Text(usize),
    /// Paths lead on through it. Holds the prefix of one of them, up to and including this member.
    Deeper(&'static [&'static str]),
}

impl Level<'_, '_, '_> {
    fn wanted(&self, name: &str) -> Wanted {
        for (index, path) in self.members.paths.0.iter().enumerate() {
            match self.path.rest(path) {
                Some([last]) if *last == name => return Wanted::Text(index),
                Some([next, ..]) if *next == name => return Wanted::Deeper(&path[..=self.path.names.len()]),
                _ => {}
            }
        }
        Wanted::Nothing
    }
}

impl<'de> DeserializeSeed<'de> for Level<'_, '_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Level<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = [false; MEMBERS_MAX];
        let mut deeper_seen: Vec<&'static [&'static str]> = Vec::new();
        while let Some(name) = map.next_key::<&RawValue>()? {
            let name = string(name.get());
            let wanted = if name.readable { self.wanted(&name.text) } else { Wanted::Nothing };
            match wanted {
                Wanted::Nothing => {
                    map.next_value::<IgnoredAny>()?;
                }
                Wanted::Text(index) => {
                    // Which of two members counts differs from parser to parser (W13): an event must not be locked under
                    // one name and read under another by the application. For members outside the key the last one counts,
                    // as in nearly every parser behind us.
                    if std::mem::replace(&mut seen[index], true) && self.members.in_key(index) {
                        return Err(A::Error::custom("duplicate member"));
                    }
                    self.found[index] = text(map.next_value()?);
                }
                Wanted::Deeper(names) => {
                    if deeper_seen.contains(&names) {
                        return Err(A::Error::custom("duplicate member"));
                    }
                    deeper_seen.push(names);
                    let value: &'de RawValue = map.next_value()?;
                    if value.get().starts_with('{') {
                        let level = Level { members: self.members, path: Path { names }, found: &mut *self.found };
                        let mut json = serde_json::Deserializer::from_str(value.get());
                        level.deserialize(&mut json).map_err(A::Error::custom)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The text of a string, or of a number exactly as it stands in the body: as a floating-point number `1.0` would be `1`
/// and long ids would be rounded.
fn text(value: &RawValue) -> Option<Text<'_>> {
    let json = value.get();
    match json.as_bytes().first()? {
        b'"' => Some(string(json)),
        b'-' | b'0'..=b'9' => Some(Text { text: Cow::Borrowed(json), readable: true }),
        _ => None,
    }
}

/// The text of a JSON string. Borrowed unless something in it is escaped.
fn string(json: &str) -> Text<'_> {
    let inner = json.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(json);
    if !json.contains('\\') {
        return Text { text: Cow::Borrowed(inner), readable: true };
    }
    match serde_json::from_str(json) {
        Ok(text) => Text { text: Cow::Owned(text), readable: true },
        Err(_) => Text { text: Cow::Borrowed(inner), readable: false },
    }
}

#[cfg(test)]
mod tests;
