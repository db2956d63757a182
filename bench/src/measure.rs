//! The measurements, one file per subject. Each alternates its sides, A B A B, so that a machine that becomes slower slows
//! both.

mod calls;
mod memory;
mod rows;
mod webhooks;

use anyhow::{Context as _, Result};

use crate::{
    asked,
    figures::{Figure, Figures, median},
    options::Options,
    process::note,
    world::World,
};

/// Measures what was requested, and saves each figure as soon as it is known.
pub(crate) struct Bench<'a> {
    pub(crate) world: &'a World,
    pub(crate) figures: &'a mut Figures,
}

/// Figures that are measured together, and how.
type Part<B> = (&'static [&'static str], fn(&mut B) -> Result<()>);

/// One side of a comparison: what it is called, and how it is run once.
type Side<'a> = (&'a str, Box<dyn FnMut() -> Result<f64> + 'a>);

impl Bench<'_> {
    pub(crate) fn run(&mut self) -> Result<()> {
        let parts: [Part<Self>; 9] = [
            (&["P1", "P2", "P3", "E1"], Self::cycles),
            (&["P4", "P5", "P6"], Self::duplicates),
            (&["P13"], Self::storms),
            (&["P14"], Self::plans),
            (&["P10"], Self::memory),
            (&["P8"], Self::webhook_duplicates),
            (&["P7", "P9"], Self::first_version),
            (&["P12"], Self::cleanup),
            (&["P11"], Self::growth),
        ];
        for (names, measure) in parts {
            if names.iter().any(|name| self.wants(name)) {
                note(&format!("{}:", names.join(", ")));
                measure(self).with_context(|| format!("while measuring {}", names.join(", ")))?;
                self.figures.write(&self.world.options.figures)?;
            }
        }
        Ok(())
    }

    fn wants(&self, name: &str) -> bool {
        self.world.options.wants(name)
    }

    /// Runs the sides in turn, and returns the median of each.
    fn alternate(&self, sides: &mut [Side<'_>]) -> Result<Vec<f64>> {
        let mut values = vec![Vec::new(); sides.len()];
        for _ in 0..self.world.options.runs {
            for ((name, side), values) in sides.iter_mut().zip(&mut values) {
                let value = side().with_context(|| format!("while running {name}"))?;
                note(&format!("    {name}: {}", short(value)));
                values.push(value);
            }
        }
        Ok(values.iter().map(|values| median(values)).collect())
    }

    /// Keeps a ratio of what [`alternate`](Self::alternate) found.
    fn ratio(&mut self, id: &str, ours: f64, other: f64, unit: &str) {
        self.keep(id, ours / other, Some((ours, other)), unit, self.world.options.runs);
    }

    /// Keeps a figure that has no other side: the median of these.
    fn keep_median(&mut self, id: &str, values: &[f64]) {
        self.keep(id, median(values), None, "", count(values));
    }

    /// Keeps a figure, from so many runs of each side: not all parts make as many as were asked for.
    fn keep(&mut self, id: &str, value: f64, sides: Option<(f64, f64)>, unit: &str, runs: u32) {
        if let Some(asked) = asked::find(id) {
            let met = if asked.bound.is_met(value) { "met" } else { "MISSED" };
            note(&format!("  {id} {}: {} ({met})", asked.what, asked.show(value)));
        }
        let Options { seconds, rows, cleanup_rows, .. } = self.world.options;
        let rows = match asked::number(id) {
            "P11" => Some(rows),
            "P12" => Some(cleanup_rows),
            _ => None,
        };
        let figure = Figure { value, sides, side_unit: unit.to_owned(), runs, seconds, rows };
        self.figures.0.insert(id.to_owned(), figure);
    }
}

fn count(values: &[f64]) -> u32 {
    u32::try_from(values.len()).unwrap_or(u32::MAX)
}

fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}
