//! docs/performance.md: the table between its marks, and the chart beside it. The rest of the file is written by people.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    asked::{ALL, Asked, Bound, number},
    chart,
    figures::{Figure, Figures},
    options::Options,
};

const BEGIN: &str = "<!-- begin: written by scripts/bench -->";
const END: &str = "<!-- end: written by scripts/bench -->";

/// Checks that there is a place for the table, and that all of it will be known, rather than finding out after half an hour of
/// measuring.
pub(crate) fn check(options: &Options, figures: &Figures) -> Result<()> {
    with(&options.document, "")?;
    let unknown = unknown(options, figures);
    ensure!(
        unknown.is_empty(),
        "--only: of {} nothing is kept in {}, and the table of {} would lose them. Measure everything first, or name another \
         --document",
        unknown.join(", "),
        options.figures.display(),
        options.document.display(),
    );
    Ok(())
}

/// What is neither measured now nor kept from an earlier run.
fn unknown(options: &Options, figures: &Figures) -> Vec<&'static str> {
    ALL.iter()
        .map(|asked| asked.id)
        .filter(|id| !options.wants(number(id)) && !needs_node(id) && !figures.0.contains_key(*id))
        .collect()
}

fn needs_node(id: &str) -> bool {
    matches!(number(id), "P7" | "P9")
}

/// Puts the table, and a description of the machine, into the document.
pub(crate) fn write(path: &Path, figures: &Figures, machine: &str) -> Result<()> {
    fs::write(path, with(path, &format!("{machine} {}\n\n{}", effort(figures), table(figures)))?)?;
    fs::write(path.with_extension("svg"), chart::draw(figures))?;
    Ok(())
}

/// How often and how long each side of a comparison ran at the least, and how often everything else was measured.
fn effort(figures: &Figures) -> String {
    let compared = || figures.0.values().filter(|figure| figure.sides.is_some());
    let mut text = Vec::new();
    if let Some(runs) = compared().map(|figure| figure.runs).min() {
        let seconds = compared().map(|figure| figure.seconds).fold(f64::INFINITY, f64::min);
        text.push(format!("Each side of a comparison: {runs} runs of {seconds} s each, or more."));
    }
    let mut others: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
    for id in ALL.iter().map(|asked| asked.id) {
        if let Some(figure) = figures.0.get(id).filter(|figure| figure.sides.is_none()) {
            others.entry(figure.runs).or_default().push(id);
        }
    }
    for (runs, ids) in others {
        let times = if runs == 1 { "once".to_owned() } else { format!("{runs} times") };
        text.push(format!("{}: measured {times}.", ids.join(", ")));
    }
    let sizes: BTreeSet<(&str, u64)> =
        figures.0.iter().filter_map(|(id, figure)| Some((number(id), figure.rows?))).collect();
    for (name, rows) in sizes {
        let rows = thousands(rows);
        text.push(match name {
            "P11" => format!("The large table of P11: {rows} rows; the small one: 1,000."),
            _ => format!("{name}: {rows} rows to delete."),
        });
    }
    text.join(" ")
}

/// A number as people write it, 5,000,000.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let parts: Vec<&[u8]> = digits.as_bytes().rchunks(3).rev().collect();
    String::from_utf8_lossy(&parts.join(&b',')).into_owned()
}

/// The document, with `new` between its marks.
fn with(path: &Path, new: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    between_marks(&text, new).with_context(|| format!("{} has not the marks {BEGIN} and {END}", path.display()))
}

fn between_marks(text: &str, new: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{new}\n{END}{after}"))
}

/// The table, for the document and for the terminal.
pub(crate) fn table(figures: &Figures) -> String {
    let mut text = "| | what | asked | measured | of | met |\n| --- | --- | --- | --- | --- | --- |\n".to_owned();
    for asked in ALL {
        text.push_str(&row(asked, figures.0.get(asked.id)));
        text.push('\n');
    }
    text.pop();
    text
}

fn row(asked: &Asked, figure: Option<&Figure>) -> String {
    let Asked { id, what, bound, unit } = asked;
    let bound_text = match bound {
        Bound::AtLeast(bound) => format!("≥ {}", unit.show(*bound)),
        Bound::AtMost(bound) => format!("≤ {}", unit.show(*bound)),
    };
    let Some(figure) = figure else {
        let why = if needs_node(id) { "not measured without --with-node" } else { "not measured" };
        return format!("| {id} | {what} | {bound_text} | {why} | | |");
    };
    let sides = match figure.sides {
        Some((ours, other)) => {
            format!("{} / {} {}", side(ours), side(other), figure.side_unit)
        }
        None => String::new(),
    };
    let met = if bound.is_met(figure.value) { "yes" } else { "**no**" };
    format!("| {id} | {what} | {bound_text} | {} | {sides} | {met} |", asked.show(figure.value))
}

fn side(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let text = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        assert_eq!(between_marks(&text, "new").unwrap(), format!("before\n{BEGIN}\nnew\n{END}\nafter\n"));
        assert!(between_marks("no marks", "new").is_none());
    }

    #[test]
    fn what_is_said_of_the_runs_is_true_of_each_row() {
        let figure =
            |sides, runs, seconds| Figure { value: 1.0, sides, side_unit: String::new(), runs, seconds, rows: None };
        let two = Some((1.0, 1.0));
        let figures = [
            ("P1", figure(two, 15, 4.0)),
            ("P10a", figure(None, 3, 2.0)),
            ("P11a", Figure { rows: Some(5_000_000), ..figure(two, 5, 4.0) }),
            ("P12a", figure(None, 3, 4.0)),
            ("P12b", Figure { rows: Some(400_000), ..figure(two, 6, 6.0) }),
            ("P13a", figure(None, 1, 4.0)),
        ];
        let figures = Figures(figures.map(|(id, figure)| (id.to_owned(), figure)).into());
        assert_eq!(
            effort(&figures),
            "Each side of a comparison: 5 runs of 4 s each, or more. P13a: measured once. P10a, P12a: measured 3 times. \
             The large table of P11: 5,000,000 rows; the small one: 1,000. P12: 400,000 rows to delete."
        );
        assert_eq!(effort(&Figures::default()), "");
    }

    #[test]
    fn a_part_is_not_measured_where_the_table_would_lose_the_rest() {
        let options = |only: &[&str]| {
            let only = only.iter().flat_map(|only| ["--only", only]);
            Options::try_parse_from(["scripts/bench"].into_iter().chain(only)).unwrap()
        };
        let known = Figure { value: 1.0, sides: None, side_unit: String::new(), runs: 1, seconds: 1.0, rows: None };
        let mut figures = Figures::default();
        assert!(unknown(&options(&[]), &figures).is_empty());
        assert!(unknown(&options(&["P1", "P3"]), &figures).starts_with(&["P2", "P4a"]));
        figures
            .0
            .extend(ALL.iter().filter(|asked| !needs_node(asked.id)).map(|asked| (asked.id.to_owned(), known.clone())));
        assert!(unknown(&options(&["P1"]), &figures).is_empty());
        figures.0.remove("P12b");
        assert_eq!(unknown(&options(&["P1"]), &figures), ["P12b"]);
        assert!(unknown(&options(&["P12"]), &figures).is_empty());
    }

    #[test]
    fn a_row_says_whether_the_bound_is_met() {
        let asked = crate::asked::find("P1").unwrap();
        let figure = |value: f64| Figure {
            value,
            sides: Some((24_000.4, 10_000.0)),
            side_unit: "/s".into(),
            runs: 5,
            seconds: 4.0,
            rows: None,
        };
        assert!(row(asked, Some(&figure(2.4))).ends_with("| ≥ 2.30 | 2.40 | 24000 / 10000 /s | yes |"));
        assert!(row(asked, Some(&figure(2.2))).ends_with("| **no** |"));
        assert!(row(asked, None).contains("not measured"));
    }
}
