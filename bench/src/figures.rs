//! The results, kept between runs, so that parts can be measured one after the other.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// One figure, with what it was computed from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// The figure that the target's bound applies to.
    pub(crate) value: f64,
    /// Its two sides, where it is a ratio: medians.
    pub(crate) sides: Option<(f64, f64)>,
    /// The unit of the sides.
    pub(crate) side_unit: String,
    /// How often each side ran; or, where there are no sides, how often it was measured.
    pub(crate) runs: u32,
    /// For how long each side ran each time. Without sides, that is not all that a measurement takes.
    pub(crate) seconds: f64,
    /// How many rows it is about, where that is a setting.
    #[serde(default)]
    pub(crate) rows: Option<u64>,
}

/// Figures by their id.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Figures(pub(crate) BTreeMap<String, Figure>);

impl Figures {
    /// The results of earlier runs.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not what this writes: delete it", path.display()))
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The median; of an even number, the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/figures.json");
        assert!(Figures::read(&path).unwrap().0.is_empty());
        let figure =
            Figure { value: 2.5, sides: Some((25.0, 10.0)), side_unit: "/s".into(), runs: 5, seconds: 4.0, rows: None };
        let figures = Figures([("P1".to_owned(), figure.clone())].into());
        figures.write(&path).unwrap();
        assert_eq!(Figures::read(&path).unwrap().0["P1"], figure);
    }
}
