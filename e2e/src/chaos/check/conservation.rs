//! I11: every delivery of a provider is counted once, from the metrics, exactly.

use std::collections::BTreeMap;

/// The samples of one counter in Prometheus' text form, by their labels as written.
pub fn samples(metrics: &str, name: &str) -> BTreeMap<String, u64> {
    metrics
        .lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            // Skips another metric whose name only begins like it.
            (labels.is_empty() || labels.starts_with('{')).then_some(())?;
            Some((labels.trim_matches(['{', '}']).to_owned(), value.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_by_their_labels() {
        let text =
            "# HELP a_total x\n# TYPE a_total counter\na_total{b=\"c\"} 3\na_total{b=\"d\"} 0\na_total_more 9\ne 4\n";
        let found = samples(text, "a_total");
        assert_eq!(found, BTreeMap::from([("b=\"c\"".to_owned(), 3), ("b=\"d\"".to_owned(), 0)]));
        assert_eq!(samples(text, "e"), BTreeMap::from([(String::new(), 4)]));
    }
}
