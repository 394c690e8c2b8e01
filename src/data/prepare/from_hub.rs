//! Sources on the Hub: what is prepared needs them no more, what was begun goes on with the same commit.

use super::manifest::Manifest;
use super::output;
use crate::config::PrepareConfig;
use crate::data::documents::Selection;
use crate::data::hub::{self, Fetched, HubSource};
use crate::tokenizer::Tokenizer;
use anyhow::Result;

/// What there is for a preparation.
pub(super) enum Found {
    /// Its source is not on the Hub.
    Nothing,
    /// It is prepared already. Neither network nor cache were asked: nobody else may have it, or it may be gone.
    Prepared(Box<Manifest>),
    /// Downloaded files.
    Files(Fetched),
}

impl Found {
    /// Looks for the result, then downloads the source.
    ///
    /// # Errors
    /// The folder was prepared otherwise, or lost files; as [`hub::fetch`].
    pub fn of(options: &PrepareConfig, selection: &Selection, t: &Tokenizer) -> Result<Self> {
        let Some(source) = HubSource::parse(&options.source)? else { return Ok(Self::Nothing) };
        if let Some(found) = Manifest::read(&options.out)? {
            let sources = found.sources;
            let same_sources = Manifest { sources, ..Manifest::begin(options, &[], t)? };
            if let Some(done) = same_sources.find_prepared()? {
                return Ok(Self::Prepared(Box::new(done)));
            }
        }
        let begun = Manifest::read_file(&output::begun(&options.out))?;
        let begun = begun.filter(|begun| begun.options.source == options.source);
        let commit = begun.and_then(|begun| begun.commit);
        hub::fetch(&source, commit.as_deref(), selection, &options.split).map(Self::Files)
    }
}
