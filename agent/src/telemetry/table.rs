//! Text tables with aligned columns. Widths are counted on the text, colour is added afterwards, so colour
//! never shifts a column. Control characters are shown as `\u{fffd}`: what a peer put into a message cannot
//! steer the terminal.

use std::fmt::Write;

/// Between two columns.
const GAP: &str = "  ";

/// Colours in the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    On,
    Off,
}

/// The meaning of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Heading,
    Good,
    Caution,
    Bad,
}

impl Style {
    /// The text, made safe for a terminal and coloured.
    pub(super) fn paint(self, text: &str, colour: Colour) -> String {
        let text = printable(text);
        let code = match (colour, self) {
            (Colour::Off, _) | (Colour::On, Self::Plain) => return text,
            (Colour::On, Self::Heading) => 1,
            (Colour::On, Self::Good) => 32,
            (Colour::On, Self::Caution) => 33,
            (Colour::On, Self::Bad) => 31,
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// One field of a row.
#[derive(Debug)]
pub(super) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    pub(super) fn styled(text: impl Into<String>, style: Style) -> Self {
        Self { text: text.into(), style }
    }
}

impl<T: ToString> From<T> for Cell {
    fn from(value: T) -> Self {
        Self::styled(value.to_string(), Style::Plain)
    }
}

/// Rows under a row of headings.
#[derive(Debug)]
pub(super) struct Table<const COLUMNS: usize> {
    rows: Vec<[Cell; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    pub(super) fn new(headings: [&str; COLUMNS]) -> Self {
        Self { rows: vec![headings.map(|heading| Cell::styled(heading, Style::Heading))] }
    }

    pub(super) fn row(&mut self, cells: [Cell; COLUMNS]) {
        self.rows.push(cells);
    }

    /// Returns true if the table has no rows under the headings.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }

    /// Appends the table to `out`, each line indented by one gap.
    pub(super) fn write(&self, out: &mut String, colour: Colour) {
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].text.chars().count()).max().unwrap_or(0);
        let widths: [usize; COLUMNS] = std::array::from_fn(width);
        for row in &self.rows {
            let mut line = String::new();
            let mut owed = 0;
            for (cell, width) in row.iter().zip(widths) {
                // Padding is written before the next field only, so that no line ends in blanks.
                // Not by a width of `write!`, which panics above 65,535.
                line.extend(std::iter::repeat_n(' ', owed));
                let _ = write!(line, "{GAP}{}", cell.style.paint(&cell.text, colour));
                owed = width - cell.text.chars().count();
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_no_line_ends_in_blanks() {
        let expected = "  NAME     N\n  längste  1\n  b        22\n  c\n";
        assert_eq!(written(Colour::Off), expected);
    }

    #[test]
    fn colour_changes_no_width() {
        let plain =
            written(Colour::On).replace("\u{1b}[1m", "").replace("\u{1b}[31m", "").replace("\u{1b}[0m", "");
        assert_eq!(
            plain.lines().map(str::trim_end).collect::<Vec<_>>(),
            written(Colour::Off).lines().collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_cell_of_any_length_is_written() {
        let mut table = Table::new(["A", "B"]);
        let long = "x".repeat(1 << 17);
        table.row([long.as_str().into(), "b".into()]);
        table.row(["a".into(), "b".into()]);
        let mut out = String::new();
        table.write(&mut out, Colour::Off);
        assert!(out.lines().all(|line| line.ends_with(" B") || line.ends_with(" b")), "columns align");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(Style::Plain.paint("a\u{1b}[2Jb\n", Colour::Off), "a\u{fffd}[2Jb\u{fffd}");
    }

    fn written(colour: Colour) -> String {
        let mut table = Table::new(["NAME", "N"]);
        table.row(["längste".into(), 1.into()]);
        table.row([Cell::styled("b", Style::Bad), 22.into()]);
        table.row(["c".into(), "".into()]);
        let mut out = String::new();
        table.write(&mut out, colour);
        out
    }
}
