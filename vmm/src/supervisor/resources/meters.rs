//! The memory in which device processes count: kept here, so that counts go on when a process is replaced.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bulkhead_ipc::metrics::{Counters, MetricsFile, QUEUES};

/// Memory for counters, by device.
#[derive(Debug, Default)]
pub struct Meters(RefCell<BTreeMap<String, Rc<MetricsFile>>>);

impl Meters {
    /// That of a device; made the first time. A device works without where the host has no memory or descriptor for it.
    pub fn of(&self, id: &str) -> Option<Rc<MetricsFile>> {
        let mut files = self.0.borrow_mut();
        if let Some(file) = files.get(id) {
            return Some(file.clone());
        }
        let file = Rc::new(MetricsFile::create().ok()?);
        files.insert(id.to_owned(), file.clone());
        Some(file)
    }

    /// What a device has counted, if it counts.
    pub fn read(&self, id: &str) -> Option<Counters> {
        self.0.borrow().get(id).map(|file| file.read(QUEUES))
    }

    /// A device is no more.
    pub fn remove(&self, id: &str) {
        self.0.borrow_mut().remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_keeps_its_memory_until_it_is_removed() {
        let meters = Meters::default();
        assert_eq!(meters.read("disk0"), None);
        let first = meters.of("disk0").unwrap();
        assert!(Rc::ptr_eq(&first, &meters.of("disk0").unwrap()));
        assert_eq!(meters.read("disk0").unwrap().requests, 0);
        meters.remove("disk0");
        assert_eq!(meters.read("disk0"), None);
    }
}
