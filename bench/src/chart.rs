//! The chart: how far each figure is from its target, as bars, in self-contained SVG.

use std::fmt::Write as _;

use crate::{
    asked::{ALL, Bound},
    figures::Figures,
};

const ROW: f64 = 22.0;
const LEFT: f64 = 60.0;
const WIDTH: f64 = 720.0;
/// Where the bar of a figure that just meets its target ends: further right is better.
const ASKED_AT: f64 = 400.0;
const RIGHT: f64 = 700.0;

/// A figure relative to its target, the larger the better.
fn score(bound: Bound, value: f64) -> f64 {
    match bound {
        Bound::AtLeast(asked) => value / asked,
        // None at all, where none is permitted.
        Bound::AtMost(0.0) => {
            if value <= 0.0 {
                1.0
            } else {
                0.0
            }
        }
        // A negative loss is better than no loss, and both are as good as the chart can show.
        Bound::AtMost(asked) => {
            if value <= 0.0 {
                f64::INFINITY
            } else {
                asked / value
            }
        }
    }
}

/// The whole chart.
pub(crate) fn draw(figures: &Figures) -> String {
    let rows: Vec<_> =
        ALL.iter().filter_map(|asked| figures.0.get(asked.id).map(|figure| (asked, figure.value))).collect();
    let height = ROW * (rows.len() as f64) + 50.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>Measured over asked</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    for (index, (asked, value)) in rows.iter().enumerate() {
        let top = ROW * (index as f64) + 30.0;
        let met = asked.bound.is_met(*value);
        let end = (LEFT + (ASKED_AT - LEFT) * score(asked.bound, *value)).clamp(LEFT + 1.0, RIGHT);
        // Writing to a String cannot fail.
        let _ = writeln!(
            svg,
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"end\">{id}</text>\
             <rect x=\"{LEFT}\" y=\"{top}\" width=\"{width:.1}\" height=\"{bar}\" fill=\"{fill}\"/>\
             <text x=\"{inside}\" y=\"{y}\" fill=\"#ffffff\">{shown}</text>",
            x = LEFT - 8.0,
            y = top + 12.5,
            id = asked.id,
            width = end - LEFT,
            bar = ROW - 5.0,
            fill = if met { "#1a7f4b" } else { "#b4441f" },
            inside = LEFT + 6.0,
            shown = asked.show(*value),
        );
    }
    let _ = write!(
        svg,
        "<line x1=\"{ASKED_AT}\" y1=\"22\" x2=\"{ASKED_AT}\" y2=\"{bottom}\" stroke=\"#222222\" stroke-dasharray=\"4 3\"/>\n\
         <text x=\"{ASKED_AT}\" y=\"16\" text-anchor=\"middle\">as asked; to the right is better</text>\n</svg>\n",
        bottom = height - 14.0,
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Figure;

    #[test]
    fn bars_pass_the_line_exactly_when_the_bound_is_met() {
        for (bound, value) in [
            (Bound::AtLeast(2.0), 2.0),
            (Bound::AtLeast(2.0), 1.9),
            (Bound::AtMost(5.0), 5.0),
            (Bound::AtMost(5.0), 5.1),
            (Bound::AtMost(10.0), -1.0),
            (Bound::AtMost(0.0), 0.0),
            (Bound::AtMost(0.0), 1.0),
        ] {
            assert_eq!(score(bound, value) >= 1.0, bound.is_met(value), "{bound:?} {value}");
        }
    }

    #[test]
    fn every_figure_has_its_bar() {
        let figure = Figure { value: 2.4, sides: None, side_unit: String::new(), runs: 5, seconds: 4.0, rows: None };
        let figures = Figures([("P1".to_owned(), figure.clone()), ("P13b".to_owned(), figure)].into());
        let svg = draw(&figures);
        assert_eq!(svg.matches("text-anchor=\"end\"").count(), 2);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }
}
