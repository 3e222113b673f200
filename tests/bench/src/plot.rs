//! The figure of `--plot`: one bar for each ratio, a second bar for the rival, a line at direct traffic.
//!
//! SVG without scripts, fonts or links. The figure has a background of its own, so that its text can be read on a light and
//! on a dark page; its colours follow the reader's preference. A value beyond the axis ends in an arrow and keeps its number.

use std::fmt::Write as _;

use super::{
    cases::Better,
    ratios::{Bar, Ratios},
};

/// The figure of the committed ratios, from the top folder.
pub(super) const FILE: &str = "tests/bench.svg";

/// Right end of the axis, a ratio. Most ratios are below 1; larger ones than this end in an arrow.
const AXIS_END: f64 = 1.5;
/// Ratios with a vertical line.
const GRID: [f64; 4] = [0.0, 0.5, 1.0, 1.5];
/// Pixels.
const WIDTH: u32 = 760;
const MARGIN: u32 = 16;
const AXIS_LEFT: u32 = 308;
const AXIS_LENGTH: u32 = 360;
const ROW: u32 = 34;
const HEADING: u32 = 28;

const STYLE: &str = "\
text{font:11px system-ui,sans-serif;fill:#1f2328}.h{font-size:16px;font-weight:600}.s,.n{font-weight:600}.n{font-size:12px}\
.m{font-size:10px;font-weight:400;fill:#59636e}.c{text-anchor:middle}.v{paint-order:stroke;stroke:#fff;stroke-width:3px}\
.b{fill:#fff;stroke:#d0d7de}.g{stroke:#d0d7de}.o{stroke:#1f2328;stroke-dasharray:4 3}.t{fill:#0969da}.r{fill:#9a6700}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.m{fill:#9198a1}.b{fill:#0d1117;stroke:#3d444d}.g{stroke:#3d444d}\
.o{stroke:#f0f6fc}.t{fill:#4493f8}.r{fill:#d29922}.v{stroke:#0d1117}}";

/// Draws the figure.
pub(super) fn svg(ratios: &Ratios) -> String {
    let sections = [("Rates: higher is better", Better::Higher), ("Times: lower is better", Better::Lower)];
    let has_rival = ratios.bars.iter().any(|bar| bar.rival.is_some());
    let mut top = if has_rival { 96 } else { 80 };
    let axis_top = top;
    let mut rows = String::new();
    for (heading, better) in sections {
        let mut bars = ratios.bars.iter().filter(|bar| bar.better == better).peekable();
        if bars.peek().is_some() {
            text(&mut rows, (MARGIN, top + 18), "s", heading);
            top += HEADING;
        }
        for bar in bars {
            row(&mut rows, bar, top);
            top += ROW;
        }
    }
    let height = top + 12;
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img">"#
    );
    head(&mut svg, ratios, has_rival, height);
    axis(&mut svg, axis_top, top);
    svg + &rows + "</svg>\n"
}

/// Background, title, machine and legend.
fn head(svg: &mut String, ratios: &Ratios, has_rival: bool, height: u32) {
    let title = "Tacit as a ratio to direct traffic";
    let (right, bottom) = (WIDTH - 1, height - 1);
    let _ = writeln!(svg, "<title>{title}</title>\n<style>{STYLE}</style>");
    let _ = writeln!(svg, r#"<rect class="b" x=".5" y=".5" width="{right}" height="{bottom}" rx="6"/>"#);
    text(svg, (MARGIN, 28), "h", title);
    text(svg, (MARGIN, 46), "m", ratios.machine.as_deref().unwrap_or("machine not in the result"));
    if has_rival {
        for (x, class, name) in [(MARGIN, "t", "Tacit"), (MARGIN + 80, "r", "rival")] {
            let _ = writeln!(svg, r#"<path class="{class}" d="M{x} 57h10v10h-10z"/>"#);
            text(svg, (x + 16, 66), "", name);
        }
    }
}

/// The vertical lines and their numbers, behind the bars.
fn axis(svg: &mut String, top: u32, bottom: u32) {
    for ratio in GRID {
        let x = AXIS_LEFT + length(ratio);
        let is_direct = (ratio - 1.0).abs() < f64::EPSILON;
        let (class, label) =
            if is_direct { ("o", "1.0 = direct".to_owned()) } else { ("g", format!("{ratio:.1}")) };
        let _ = writeln!(svg, r#"<path class="{class}" d="M{x} {top}V{bottom}"/>"#);
        text(svg, (x, top - 6), "m c", &label);
    }
}

/// The names, the bars and the numbers of one ratio.
fn row(svg: &mut String, bar: &Bar, top: u32) {
    let (name, unit, what) = (escaped(&bar.name), escaped(&bar.unit), escaped(&bar.what));
    let _ = writeln!(
        svg,
        r#"<text class="n" x="{MARGIN}" y="{}">{name} <tspan class="m">{unit}</tspan><tspan class="m" x="{MARGIN}" dy="13">{what}</tspan></text>"#,
        top + 13
    );
    match bar.rival {
        None => value(svg, "t", (top + 9, 16), bar.tacit),
        Some(rival) => {
            value(svg, "t", (top + 4, 12), bar.tacit);
            value(svg, "r", (top + 18, 12), rival);
        }
    }
}

/// One bar and its number; an arrow when the value is beyond the axis.
fn value(svg: &mut String, class: &str, (top, height): (u32, u32), ratio: f64) {
    let long = length(ratio);
    let mut end = AXIS_LEFT + long;
    let _ = writeln!(
        svg,
        r#"<rect class="{class}" x="{AXIS_LEFT}" y="{top}" width="{long}" height="{height}"/>"#
    );
    if ratio > AXIS_END {
        let half = height / 2;
        let _ = writeln!(svg, r#"<path class="{class}" d="M{end} {top}l8 {half}l-8 {half}z"/>"#);
        end += 8;
    }
    text(svg, (end + 5, top + height / 2 + 4), "v", &format!("{ratio:.2}"));
}

fn text(svg: &mut String, (x, y): (u32, u32), class: &str, content: &str) {
    let class = if class.is_empty() { String::new() } else { format!(r#" class="{class}""#) };
    let _ = writeln!(svg, r#"<text{class} x="{x}" y="{y}">{}</text>"#, escaped(content));
}

/// Pixels of a ratio, at most the axis.
fn length(ratio: f64) -> u32 {
    let pixels = ratio.clamp(0.0, AXIS_END) / AXIS_END * f64::from(AXIS_LENGTH);
    // Between 0 and the length of the axis.
    pixels.round() as u32
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    fn bar(name: &str, tacit: f64, rival: Option<f64>) -> Bar {
        let (what, unit) = ("a <load> & more".to_owned(), "us".to_owned());
        Bar { name: name.to_owned(), what, unit, better: Better::Higher, tacit, rival }
    }

    fn figure(bars: Vec<Bar>) -> String {
        svg(&Ratios { machine: Some("a CPU, 2 cores".to_owned()), bars })
    }

    /// Fails unless every element is closed in turn and no text holds a bare `&`.
    fn assert_well_formed(svg: &str) {
        let mut open: Vec<&str> = Vec::new();
        for part in svg.split('<').skip(1) {
            let (tag, text) = part.split_once('>').expect("every tag ends");
            assert!(!text.contains('>'), "{part}");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            let name = tag.trim_start_matches('/').split([' ', '/']).next().expect("a name");
            match (tag.starts_with('/'), tag.ends_with('/')) {
                (true, _) => assert_eq!(open.pop(), Some(name), "{tag}"),
                (false, false) => open.push(name),
                (false, true) => {}
            }
            let known =
                ["&amp;", "&lt;", "&gt;"].iter().map(|entity| text.matches(entity).count()).sum::<usize>();
            assert_eq!(text.matches('&').count(), known, "{text}");
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn every_ratio_has_a_bar_and_every_rival_a_second_one() {
        let svg = figure(vec![bar("one", 0.5, None), bar("two", 0.75, Some(0.25))]);
        assert_well_formed(&svg);
        assert_eq!(svg.matches(r#"<rect class="t""#).count(), 2);
        assert_eq!(svg.matches(r#"<rect class="r""#).count(), 1);
        assert!(svg.contains(">one ") && svg.contains(">two "), "{svg}");
        assert!(svg.contains(r#"width="120""#) && svg.contains(r#"width="180""#), "{svg}");
        assert!(svg.contains("a CPU, 2 cores") && svg.contains(">rival<"));
    }

    #[test]
    fn a_value_beyond_the_axis_ends_in_an_arrow_and_keeps_its_number() {
        let inside = figure(vec![bar("inside", 1.5, None)]);
        let beyond = figure(vec![bar("beyond", 2.042, None)]);
        assert_well_formed(&beyond);
        assert_eq!(inside.matches(r#"<path class="t""#).count(), 0);
        assert_eq!(beyond.matches(r#"<path class="t""#).count(), 1);
        assert!(
            beyond.contains(&format!(r#"width="{AXIS_LENGTH}""#)) && beyond.contains(">2.04<"),
            "{beyond}"
        );
        assert!(!beyond.contains(">rival<"));
    }

    #[test]
    fn a_result_of_all_cases_with_a_rival_stays_below_12_kilobytes() {
        let bars =
            cases::all().into_iter().map(|case| Bar { what: case.what, ..bar(&case.name, 0.5, Some(0.5)) });
        let svg = figure(bars.collect());
        assert!(svg.len() < 12 * 1024, "{} bytes", svg.len());
    }

    #[test]
    fn the_committed_figure_shows_the_committed_ratios() {
        let committed = Ratios::parse(include_str!("../../bench-baseline.json")).expect("the baseline");
        let figure = include_str!("../../bench.svg");
        assert_well_formed(figure);
        assert!(
            svg(&committed) == figure,
            "{FILE} is of other ratios: `cargo xtask bench --plot {FILE} --from`"
        );
    }
}
