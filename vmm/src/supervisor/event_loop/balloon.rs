//! The balloon: its size, and what is known of the guest's memory.

use std::collections::BTreeMap;

use bulkhead_ipc::channel::message::{BalloonReport, ToDevice};

use super::EventLoop;
use crate::supervisor::api::{BalloonEntry, Response};
use crate::supervisor::config::balloon::BALLOON_PAGE;
use crate::supervisor::config::balloon_pages;

/// The statistics by their tags (virtio 1.2, 5.5.6.4).
const NAMES: [&str; 10] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free",
    "total",
    "available",
    "disk-caches",
    "hugetlb-allocations",
    "hugetlb-failures",
];

impl EventLoop<'_> {
    /// A client wants to know of the balloon, or gives it another size. It is answered when the process has.
    pub(super) fn ask_balloon(&mut self, client: u16, size: Option<u64>) -> Result<(), String> {
        let memory = self.config.memory;
        let Some(balloon) = &mut self.resources.balloon else {
            return Err("this machine has no balloon: start it with --balloon".to_owned());
        };
        let target = size.map(|size| balloon_pages(size, memory)).transpose();
        let target = target.map_err(|error| error.to_string())?;
        // A successor of the process is told, too.
        balloon.target = target.unwrap_or(balloon.target);
        balloon.clients.retain(|other| *other != client);
        balloon.clients.push(client);
        let id = balloon.id.clone();
        self.tell(&id, &ToDevice::Balloon { target });
        Ok(())
    }

    /// The process of the balloon has said how large it is.
    pub(super) fn balloon_report(&mut self, id: &str, report: &BalloonReport) {
        let Some(balloon) = self.resources.balloon.as_mut().filter(|balloon| balloon.id == id) else {
            return;
        };
        balloon.report(report);
        let Some(statistics) = &report.statistics else { return };
        let clients = std::mem::take(&mut balloon.clients);
        let pages = |count: u32| u64::from(count).saturating_mul(BALLOON_PAGE);
        let entry = BalloonEntry {
            target: pages(balloon.target),
            actual: pages(balloon.actual),
            statistics: named(statistics),
        };
        for client in clients {
            let response = Response::Balloon(entry.clone());
            self.environment.server.respond(client, &response, &self.environment.poller);
        }
    }
}

/// Those that have a name; VIRTIO_BALLOON_S_NR values at most.
fn named(statistics: &[(u16, u64)]) -> BTreeMap<String, u64> {
    let name = |tag: u16| NAMES.get(usize::from(tag)).map(|name| (*name).to_owned());
    statistics.iter().filter_map(|(tag, value)| Some((name(*tag)?, *value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_have_the_names_of_the_specification() {
        let named = named(&[(4, 100), (5, 200), (99, 1), (4, 300)]);
        assert_eq!(named, [("free".to_owned(), 300), ("total".to_owned(), 200)].into());
    }
}
