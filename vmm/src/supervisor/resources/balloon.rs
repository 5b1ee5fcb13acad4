//! A balloon, as the supervisor knows it: what outlives its process, and who wants to hear of it.

use bulkhead_ipc::channel::message::BalloonReport;

use crate::supervisor::config::BalloonConfig;

/// A balloon. There is nothing of the host to be opened for it: its process gives back memory that it has anyway.
#[derive(Debug)]
pub struct Balloon {
    /// Its id.
    pub id: String,
    /// The guest may take pages back when it has none left.
    pub deflate_on_oom: bool,
    /// The guest names the pages that it does not use.
    pub free_page_reporting: bool,
    /// The size that it is to have, pages of 4 KiB.
    pub target: u32,
    /// The size that it has, as its process said last.
    pub actual: u32,
    /// Clients that wait for an answer.
    pub clients: Vec<u16>,
}

impl Balloon {
    /// A balloon that the guest has not seen.
    pub fn new(config: &BalloonConfig) -> Self {
        Self {
            id: config.id.clone(),
            deflate_on_oom: config.deflate_on_oom,
            free_page_reporting: config.free_page_reporting,
            target: config.target,
            actual: 0,
            clients: Vec::new(),
        }
    }

    /// Its process has said something, which may be a lie: it concerns nobody but this guest.
    pub fn report(&mut self, report: &BalloonReport) {
        self.actual = report.actual;
    }
}
