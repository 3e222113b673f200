//! Mistakes in a file: one, all of them, and the collector that gathers them while the file is decoded.

use std::{
    cell::{Cell, RefCell},
    fmt::{self, Display},
    path::Path,
};

/// Most mistakes listed for one file; past that an operator reads the first ones anyway.
pub(super) const MISTAKES_MAX: usize = 100;

/// One thing wrong in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Line it stands in, counted from 1.
    pub line: usize,
    /// Path of the field, such as `meshRanges[1]`; empty for the document as a whole.
    pub field: String,
    /// The value seen, what is wrong with it and what to do.
    pub problem: String,
}

impl Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.text())
    }
}

impl Mistake {
    /// Without the line.
    pub fn text(&self) -> String {
        match self.field.as_str() {
            "" => self.problem.clone(),
            field => format!("{field}: {}", self.problem),
        }
    }
}

/// Everything wrong in one file, in the order of its lines; displayed one mistake a line as `file:line:
/// field: problem`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes {
    /// The file, as the operator named it.
    pub file: String,
    /// The mistakes, at least one.
    pub list: Vec<Mistake>,
}

impl Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.list.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            write!(f, "{newline}{}:{}: {}", self.file, mistake.line, mistake.text())?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

/// The mistakes found so far. Shared by all values of a file, hence the cells.
#[derive(Default)]
pub(super) struct Collector {
    list: RefCell<Vec<Mistake>>,
    unlisted: Cell<usize>,
}

impl Collector {
    pub(super) fn add(&self, line: usize, field: &str, problem: impl Display) {
        let mut list = self.list.borrow_mut();
        if list.len() < MISTAKES_MAX {
            list.push(Mistake { line, field: field.to_owned(), problem: problem.to_string() });
        } else {
            self.unlisted.set(self.unlisted.get() + 1);
        }
    }

    pub(super) fn finish<T>(self, decoded: Option<T>, file: &Path) -> Result<T, Mistakes> {
        let mut list = self.list.into_inner();
        match decoded {
            Some(value) if list.is_empty() => return Ok(value),
            None if list.is_empty() => list.push(Mistake {
                line: 1,
                field: String::new(),
                problem: "refused without a stated reason: this is a bug of Tacit, please report it"
                    .to_owned(),
            }),
            _ => list.sort_by_key(|mistake| mistake.line),
        }
        if self.unlisted.get() > 0 {
            let problem =
                format!("{} more mistakes are not listed: correct those above first", self.unlisted.get());
            let line = list.last().map_or(1, |mistake| mistake.line);
            list.push(Mistake { line, field: String::new(), problem });
        }
        Err(Mistakes { file: file.display().to_string(), list })
    }
}
