//! Simulates a power cut from the system calls of a process that was traced under load.
//!
//! What the model covers: for each file, whatever had been written before the last fsync or fdatasync that had returned is
//! on the disk. Of what was written since, any part may be there, in any order, torn at any sector; a file may have its
//! new length or the old one, with zeros in between. What it leaves out: a disk that acknowledges what it does not keep,
//! and directories that forget that a file was created or removed (SQLite syncs them before anything depends on it).
//!
//! The time of a call in the trace was taken before it began. So an answer that a caller had received before a line's time
//! was sent before that line, and whatever it depends on is above it.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};

use super::seed::Dice;

/// The unit that a disk writes atomically.
const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

#[derive(Clone, Debug)]
enum Event {
    Change(Change),
    /// What had been written when the sync began is on the disk: this many changes of the file.
    Synced(usize),
    Removed,
}

/// What a process did with the files of one directory.
#[derive(Debug, Default)]
pub struct Trace {
    // With the time they began, in seconds since 1970, and the file's name.
    events: Vec<(f64, String, Event)>,
}

/// The content of files after a power cut.
pub type Files = BTreeMap<String, Vec<u8>>;

impl Trace {
    /// Reads strace's log: the files of `directory` whose names begin with `prefix`.
    ///
    /// # Errors
    /// A line that is not what strace writes.
    pub fn read(log: &Path, directory: &Path, prefix: &str) -> Result<Self> {
        let directory = directory.canonicalize()?;
        let mut trace = Self::default();
        let mut changes: BTreeMap<String, usize> = BTreeMap::new();
        // Calls interrupted in the log by another thread's: what they will have done when they return.
        let mut open: BTreeMap<String, (String, Event)> = BTreeMap::new();
        for line in BufReader::new(fs::File::open(log)?).lines() {
            let line = line?;
            let Some((thread, rest)) = line.split_once(' ') else { continue };
            let Some((time, call)) = rest.trim_start().split_once(' ') else { continue };
            let time: f64 = time.parse().with_context(|| format!("no time: {rest:.80}"))?;
            if call.starts_with("<...") {
                if let Some((file, event)) = open.remove(thread) {
                    trace.push(&mut changes, time, file, event);
                }
                continue;
            }
            let Some((name, arguments)) = call.split_once('(') else { continue };
            let removed = matches!(name, "unlink" | "unlinkat");
            let named = if removed {
                removed_file(arguments, &directory, prefix)
            } else {
                file_of(arguments, &directory, prefix)
            };
            let Some((file, arguments)) = named else { continue };
            let event = match name {
                _ if removed && call.contains(" = -1 ENOENT") => continue,
                _ if removed => Event::Removed,
                // A sync covers what was written before it began, which is what is counted here.
                "fdatasync" | "fsync" => Event::Synced(changes.get(&file).copied().unwrap_or_default()),
                "pwrite64" => Event::Change(write(arguments)?),
                "ftruncate" => Event::Change(Change::Truncate(number(arguments.trim_start_matches(", "))?)),
                other => anyhow::bail!("{other} on {file}, which the model does not know"),
            };
            if call.ends_with("<unfinished ...>") {
                open.insert(thread.to_owned(), (file, event));
            } else {
                ensure!(
                    !call.contains(" = -1 "),
                    "a call that failed: {}",
                    call.split(" = ").last().unwrap_or_default()
                );
                trace.push(&mut changes, time, file, event);
            }
        }
        Ok(trace)
    }

    fn push(&mut self, changes: &mut BTreeMap<String, usize>, time: f64, file: String, event: Event) {
        match event {
            Event::Change(_) => *changes.entry(file.clone()).or_default() += 1,
            Event::Removed => drop(changes.remove(&file)),
            Event::Synced(_) => {}
        }
        self.events.push((time, file, event));
    }

    /// How many moments there are to cut at.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing was traced.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// How many syncs there were of a file.
    pub fn syncs(&self, file: &str) -> usize {
        self.events.iter().filter(|(_, name, event)| name == file && matches!(event, Event::Synced(_))).count()
    }

    /// When the event of this number began, in seconds since 1970.
    pub fn time(&self, number: usize) -> f64 {
        self.events[number].0
    }

    /// What the files hold when the power fails before the event of this number. `honest`: a sync keeps what was written;
    /// otherwise it is assumed to have done nothing, which shows that the model can lose something.
    pub fn cut(&self, number: usize, dice: &mut Dice, honest: bool) -> Files {
        let mut written: BTreeMap<&str, (Vec<&Change>, usize)> = BTreeMap::new();
        for (_, file, event) in &self.events[..number] {
            if matches!(event, Event::Removed) {
                written.remove(&**file);
                continue;
            }
            let (changes, synced) = written.entry(file).or_default();
            match event {
                Event::Change(change) => changes.push(change),
                Event::Synced(count) if honest => *synced = (*synced).max(*count),
                Event::Synced(_) | Event::Removed => {}
            }
        }
        // Some disks keep nearly everything, some nearly nothing.
        let kept = *dice.one_of(&[0, 10, 50, 90, 100]);
        written
            .into_iter()
            .map(|(file, (changes, synced))| {
                let mut bytes = Vec::new();
                for (place, change) in changes.into_iter().enumerate() {
                    apply(&mut bytes, change, |_| place < synced || dice.percent(kept));
                }
                (file.to_owned(), bytes)
            })
            .collect()
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change, mut keeps: impl FnMut(usize) -> bool) {
    match change {
        Change::Truncate(length) => {
            if keeps(0) {
                bytes.resize(*length, 0);
            }
        }
        Change::Write(offset, data) => {
            // The file has grown, whether or not its new sectors have arrived.
            if keeps(0) {
                bytes.resize(bytes.len().max(offset + data.len()), 0);
            }
            let mut done = 0;
            while done < data.len() {
                // Up to the next sector boundary.
                let count = (SECTOR - (offset + done) % SECTOR).min(data.len() - done);
                if keeps(done) {
                    let (from, to) = (offset + done, offset + done + count);
                    bytes.resize(bytes.len().max(to), 0);
                    bytes[from..to].copy_from_slice(&data[done..done + count]);
                }
                done += count;
            }
        }
    }
}

/// The name of the file in `7</path/name>, ...`, with what follows, if it is one that matters.
fn file_of<'a>(arguments: &'a str, directory: &Path, prefix: &str) -> Option<(String, &'a str)> {
    let (_, rest) = arguments.split_once('<')?;
    let (path, rest) = rest.split_once('>')?;
    Some((name_of(path, directory, prefix)?, rest))
}

/// The same in `"/path/name") = 0`, or with a directory before it.
fn removed_file<'a>(arguments: &'a str, directory: &Path, prefix: &str) -> Option<(String, &'a str)> {
    let (_, rest) = arguments.split_once('"')?;
    let (path, rest) = rest.split_once('"')?;
    Some((name_of(path, directory, prefix)?, rest))
}

fn name_of(path: &str, directory: &Path, prefix: &str) -> Option<String> {
    // With -xx, paths are written in hexadecimal as well.
    let path = if path.starts_with("\\x") { String::from_utf8(unhex(path)?).ok()? } else { path.to_owned() };
    let name = Path::new(&path).strip_prefix(directory).ok()?.to_str()?;
    name.starts_with(prefix).then(|| name.to_owned())
}

/// `, "\x00\x01", 2, 4096...`
fn write(arguments: &str) -> Result<Change> {
    let (_, rest) = arguments.split_once('"').context("no data")?;
    let (data, rest) = rest.split_once('"').context("no end of the data")?;
    let data = unhex(data).context("data that is not in hexadecimal")?;
    let mut numbers = rest.trim_start_matches(", ").split(", ");
    let length = number(numbers.next().unwrap_or_default())?;
    ensure!(data.len() == length, "{length} bytes were written, and {} traced", data.len());
    Ok(Change::Write(number(numbers.next().unwrap_or_default())?, data))
}

fn number(text: &str) -> Result<usize> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).map_or(text, |end| &text[..end]);
    digits.parse().with_context(|| format!("no number: {text:.40}"))
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.as_bytes()
        .chunks(4)
        .map(|four| match four {
            [b'\\', b'x', high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::seed::Seed;

    #[test]
    fn what_was_synced_is_kept_and_what_was_not_may_be_lost() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let root = directory.path().canonicalize()?;
        let log = directory.path().join("log");
        let file = |name: &str| format!("{}/{name}", root.display());
        let text = [
            format!("7 100.5 pwrite64(3<{}>, \"\\x61\\x62\", 2, 0) = 2", file("a.db")),
            format!("7 101.5 fdatasync(3<{}> <unfinished ...>", file("a.db")),
            format!("8 102.5 pwrite64(3<{}>, \"\\x63\", 1, 2) = 1", file("a.db")),
            format!("8 103.5 write(1<{}>, \"\\x63\", 1) = 1", file("other")),
            "7 104.5 <... fdatasync resumed>) = 0".to_owned(),
            format!("7 105.5 ftruncate(3<{}>, 1) = 0", file("a.db")),
        ];
        fs::write(&log, text.join("\n"))?;
        let trace = Trace::read(&log, directory.path(), "a.db")?;
        assert_eq!((trace.len(), trace.syncs("a.db")), (4, 1));
        let mut dice = Seed(1).dice("cuts");
        let mut seen = |number: usize, honest: bool| {
            let cuts = (0..200).map(|_| trace.cut(number, &mut dice, honest).remove("a.db").unwrap_or_default());
            cuts.collect::<std::collections::BTreeSet<_>>()
        };
        let all = |texts: &[&[u8]]| texts.iter().map(|text| text.to_vec()).collect();
        // Before the sync has returned; after it, when what came in between is still open; and after the truncation.
        assert_eq!(seen(1, true), all(&[b"", b"\0\0", b"ab"]));
        assert_eq!(seen(3, true), all(&[b"ab", b"ab\0", b"abc"]));
        assert_eq!(seen(4, true), all(&[b"ab", b"ab\0", b"abc", b"a"]));
        assert!(seen(3, false).contains(&b""[..]), "a disk that lies");
        Ok(())
    }

    #[test]
    fn a_file_that_was_removed_is_gone_and_one_that_is_made_anew_begins_empty() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let root = directory.path().canonicalize()?;
        let log = directory.path().join("log");
        let file = format!("{}/a.db-journal", root.display());
        let text = [
            format!("7 100.5 pwrite64(3<{file}>, \"\\x61\\x62\", 2, 0) = 2"),
            format!("7 101.5 fsync(3<{file}>) = 0"),
            format!("7 102.5 unlink(\"{file}\") = 0"),
            format!("7 102.6 unlink(\"{file}\") = -1 ENOENT (No such file or directory)"),
            format!("7 103.5 pwrite64(3<{file}>, \"\\x63\", 1, 0) = 1"),
            format!("7 104.5 fsync(3<{file}>) = 0"),
        ];
        fs::write(&log, text.join("\n"))?;
        let trace = Trace::read(&log, directory.path(), "a.db")?;
        let mut dice = Seed(1).dice("cuts");
        let mut held = |number| trace.cut(number, &mut dice, true).remove("a.db-journal");
        assert_eq!([held(2), held(3), held(5)], [Some(b"ab".to_vec()), None, Some(b"c".to_vec())]);
        Ok(())
    }
}
