//! The output of commands: results on standard output, complaints on standard error.
//!
//! Everything goes through here, because `println!` panics when the reader has gone away (`oncegate ... | head`), and
//! because no text from outside may control the terminal: whatever a terminal would act on is shown in escaped form.

use std::{
    borrow::Cow,
    fmt::Display,
    io::{self, IsTerminal as _, Write as _},
    sync::{Mutex, PoisonError},
};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde::Serialize;

/// Shows a line.
pub(crate) fn line(text: impl Display) {
    // If nobody reads any more, there is nobody to tell.
    let _ = try_line(text);
}

/// Shows a line. An error means that nobody reads any more, or that nothing more can be written, which [`finish`] reports:
/// a command that would continue can end.
pub(crate) fn try_line(text: impl Display) -> io::Result<()> {
    let text = text.to_string();
    noted(writeln!(io::stdout(), "{}", printable(&text, true)))
}

/// The first error of standard output, except a reader that has gone away: `... | head` is not an error.
static FAILED: Mutex<Option<io::Error>> = Mutex::new(None);

fn noted(written: io::Result<()>) -> io::Result<()> {
    written.map_err(|error| {
        let kind = error.kind();
        if kind != io::ErrorKind::BrokenPipe {
            FAILED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
        kind.into()
    })
}

/// Writes the rest of the output, at the end.
///
/// # Errors
///
/// Why some of it could not be written, for example on a full disk.
pub(crate) fn finish() -> io::Result<()> {
    let _ = noted(io::stdout().flush());
    FAILED.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
}

/// On a terminal, replaces the previous text; elsewhere, writes below it. Errors as with [`try_line`].
pub(crate) fn redraw(text: &str) -> io::Result<()> {
    noted(try_redraw(text))
}

fn try_redraw(text: &str) -> io::Result<()> {
    /// Go to the top left corner; clear to the end of the line; clear to the end of the screen.
    const HOME: &str = "\x1b[H";
    const TO_END_OF_LINE: &str = "\x1b[K";
    const TO_END_OF_SCREEN: &str = "\x1b[J";

    let mut stdout = io::stdout().lock();
    if !stdout.is_terminal() {
        writeln!(stdout, "{}\n", printable(text, true))?;
        return stdout.flush();
    }
    // Written over the old text instead of clearing it first: an empty screen in between flickers.
    let mut screen = HOME.to_owned();
    for line in printable(text, true).lines() {
        screen.extend([line, TO_END_OF_LINE, "\n"]);
    }
    screen.push_str(TO_END_OF_SCREEN);
    stdout.write_all(screen.as_bytes())?;
    stdout.flush()
}

/// Writes what the program itself made, byte for byte.
pub(crate) fn raw(bytes: &[u8]) {
    let _ = noted(io::stdout().write_all(bytes));
}

/// Shows something in addition to the result, which does not end up in a pipe.
pub(crate) fn notice(text: impl Display) {
    let text = text.to_string();
    let _ = writeln!(io::stderr(), "{}", printable(&text, true));
}

/// Whether there is somebody to ask.
pub(crate) fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks a question that is answered with yes or no; anything but yes is no.
pub(crate) fn ask(question: impl Display) -> bool {
    let question = question.to_string();
    let mut stderr = io::stderr();
    let _ = write!(stderr, "{} [y/N] ", printable(&question, true));
    let _ = stderr.flush();
    let mut answer = String::new();
    match io::stdin().read_line(&mut answer) {
        Ok(_) => matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"),
        Err(_) => false,
    }
}

/// Says what went wrong.
pub(crate) fn complain(text: impl Display) {
    let text = text.to_string();
    let _ = writeln!(io::stderr(), "oncegate: {}", printable(&text, true));
}

/// Shows a value to a program.
pub(crate) fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => line(escape_json(&text)),
        Err(error) => complain(format_args!("cannot write JSON: {error}")),
    }
}

/// Shows a value to a program, in one line. Errors as with [`try_line`].
pub(crate) fn json_line(value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string(value)?;
    try_line(escape_json(&text))
}

/// A column of a table.
#[derive(Clone, Copy)]
pub(crate) enum Column {
    /// Words.
    Text(&'static str),
    /// Numbers, aligned right.
    Number(&'static str),
}

/// Shows a table to people.
pub(crate) fn table(columns: &[Column], rows: impl IntoIterator<Item = Vec<String>>) {
    line(render(columns, rows));
}

/// A table as text.
pub(crate) fn render(columns: &[Column], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(columns.iter().map(|column| match column {
        Column::Text(name) | Column::Number(name) => *name,
    }));
    // Made printable here already, since a cell's text decides the width of its column.
    table.add_rows(
        rows.into_iter()
            .map(|row| -> Vec<String> { row.iter().map(|cell| printable(cell, false).into_owned()).collect() }),
    );
    for (column, kind) in table.column_iter_mut().zip(columns) {
        if let Column::Number(_) = kind {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// A text kept on one line, with everything a terminal would act on escaped.
pub(crate) fn one_line(text: &str) -> Cow<'_, str> {
    printable(text, false)
}

/// A text in which everything that a terminal would act on, or that would change the displayed order, is made visible.
fn printable(text: &str, lines: bool) -> Cow<'_, str> {
    let shown = |c: char| !is_obeyed(c) || (lines && c == '\n');
    if text.chars().all(shown) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if shown(c) { escaped.push(c) } else { escaped.extend(c.escape_default()) }
    }
    Cow::Owned(escaped)
}

/// JSON that is safe for a terminal: serde_json leaves DEL and everything beyond ASCII as it is. Outside strings the only
/// such characters are line breaks.
fn escape_json(text: &str) -> Cow<'_, str> {
    let shown = |c: char| !is_obeyed(c) || c == '\n';
    if text.chars().all(shown) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if shown(c) {
            escaped.push(c);
        } else {
            // All of them lie in the first plane, where four digits are enough.
            escaped.push_str(&format!("\\u{:04x}", u32::from(c)));
        }
    }
    Cow::Owned(escaped)
}

/// Control characters (C0, DEL and C1, where 0x9b starts a sequence like ESC [), and those that change the writing
/// direction or are invisible.
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{061c}')
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a\x1b[2J\r\u{9b}31m\u{202e}b\x7f\nü";

    #[test]
    fn nothing_that_a_terminal_obeys_is_sent() {
        assert_eq!(printable(HOSTILE, false), r"a\u{1b}[2J\r\u{9b}31m\u{202e}b\u{7f}\nü");
        assert_eq!(printable("two\nlines", true), "two\nlines");
        assert!(matches!(printable("plain ü", false), Cow::Borrowed(_)));
        let table = render(&[Column::Text("a"), Column::Number("b")], [vec![HOSTILE.to_owned(), "1".to_owned()]]);
        assert!(!table.chars().any(|c| c.is_control() && c != '\n'), "{table:?}");
        assert_eq!(table.lines().count(), 3, "a cell cannot make a row: {table}");
    }

    #[test]
    fn escaped_json_is_the_same_json() {
        let value = serde_json::json!({ "error": HOSTILE });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let escaped = escape_json(&text);
        assert!(!escaped.chars().any(|c| is_obeyed(c) && c != '\n'), "{escaped:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap(), value);
    }
}
