//! An error in one line, for places where a message is plain text.

use std::{error::Error as StdError, fmt};

/// Prints an error and its sources, separated by colons: libraries put the helpful half into the sources.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a>(pub &'a (dyn StdError + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::ReadError;

    #[test]
    fn sources_are_printed_behind_the_error() {
        let error = ReadError::Io { path: "/run/secret".into(), source: std::io::Error::other("denied") };
        assert_eq!(Chain(&error).to_string(), "cannot read /run/secret: denied");
        assert_eq!(Chain(&ReadError::Empty).to_string(), "no secret was given");
    }
}
