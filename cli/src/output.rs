//! What commands show: results on standard output, complaints on standard error.
//!
//! Everything goes through here, because `println!` panics when the reader has gone away (`oncegate ... | head`).

use std::{
    fmt::Display,
    io::{self, Write as _},
};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde::Serialize;

/// Shows a line.
pub(crate) fn line(text: impl Display) {
    // Nobody is left to tell that there is nobody left to tell.
    let _ = writeln!(io::stdout(), "{text}");
}

/// Says what went wrong.
pub(crate) fn complain(text: impl Display) {
    let _ = writeln!(io::stderr(), "oncegate: {text}");
}

/// Shows a value to a program.
pub(crate) fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => line(text),
        Err(error) => complain(format_args!("cannot write JSON: {error}")),
    }
}

/// A column of a table.
#[derive(Clone, Copy)]
pub(crate) enum Column {
    /// Words.
    Text(&'static str),
    /// Figures: their ends stand below each other.
    Number(&'static str),
}

/// Shows a table to people.
pub(crate) fn table(columns: &[Column], rows: impl IntoIterator<Item = Vec<String>>) {
    line(render(columns, rows));
}

fn render(columns: &[Column], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(columns.iter().map(|column| match column {
        Column::Text(name) | Column::Number(name) => *name,
    }));
    table.add_rows(rows);
    for (column, kind) in table.column_iter_mut().zip(columns) {
        if let Column::Number(_) = kind {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}
