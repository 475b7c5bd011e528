//! Tables.

use std::fmt::{self, Write as _};

/// A Markdown table whose source can be read too.
#[derive(Clone, Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a head and no rows.
    pub fn new<T: Into<String>>(head: impl IntoIterator<Item = T>) -> Self {
        Self {
            rows: vec![head.into_iter().map(Into::into).collect()],
        }
    }

    /// One more row; a short one is filled up with empty cells.
    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        let mut cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        cells.resize(self.rows[0].len(), String::new());
        self.rows.push(cells);
    }

    /// All rows of another table with as many columns.
    pub fn append(&mut self, other: Self) {
        for row in other.rows.into_iter().skip(1) {
            self.row(row);
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows[0].len();
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = self.rows.iter().map(|row| row[column].chars().count());
                cells.max().unwrap_or_default()
            })
            .collect();
        for (n, row) in self.rows.iter().enumerate() {
            let mut line = String::from("|");
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if column == 0 {
                    write!(line, " {cell:<width$} |")?;
                } else {
                    write!(line, " {cell:>width$} |")?;
                }
            }
            writeln!(f, "{line}")?;
            if n == 0 {
                let mut rule = String::from("|");
                for (column, width) in widths.iter().enumerate() {
                    let end = if column == 0 { "-" } else { ":" };
                    write!(rule, "{}{end}|", "-".repeat(width + 1))?;
                }
                writeln!(f, "{rule}")?;
            }
        }
        Ok(())
    }
}

/// The middle one of some numbers; not a number when there is none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which the given share of the numbers lies.
#[must_use]
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = as_f64(values.len()) - 1.0;
    // The first one with that much below it: looked for, not computed, since a float makes no index without a cast.
    values
        .iter()
        .enumerate()
        .find(|(below, _)| as_f64(*below) >= share * last)
        .map_or(f64::NAN, |(_, value)| *value)
}

/// A count as a number to divide.
#[must_use]
pub fn as_f64(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_of_the_list() {
        let values = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(
            [0.0, 0.25, 0.5, 0.75, 1.0].map(|share| quantile(&values, share)),
            [1.0, 2.0, 3.0, 4.0, 5.0]
        );
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["", "a"]);
        table.row(["`x`", "100"]);
        table.row(["y"]);
        let text = "|     |   a |\n|-----|----:|\n| `x` | 100 |\n| y   |     |\n";
        assert_eq!(table.to_string(), text);
    }
}
