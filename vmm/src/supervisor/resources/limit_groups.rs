//! The limit groups of a machine: their memory, and which device has which place.

use std::collections::BTreeMap;
use std::io;

use bulkhead_ipc::channel::message::{GroupConfig, Rates};
use bulkhead_ipc::limit_group::GroupMemory;

use crate::supervisor::config::LimitGroupSpec;
use crate::supervisor::config::limit_group::LimitGroupError;
use crate::supervisor::process::Fds;

/// The groups, by name.
#[derive(Debug, Default)]
pub struct LimitGroups(BTreeMap<String, Group>);

#[derive(Debug)]
struct Group {
    rates: Rates,
    memory: GroupMemory,
    /// The places by device.
    places: BTreeMap<String, usize>,
}

impl LimitGroups {
    /// Makes their memory; nobody is in any.
    ///
    /// # Errors
    /// The host refuses memory or descriptors.
    pub fn open(specs: &[LimitGroupSpec]) -> io::Result<Self> {
        let mut groups = BTreeMap::new();
        for LimitGroupSpec { id, bps, iops } in specs {
            let rates =
                Rates { bps: bps.rate, bps_burst: bps.burst, iops: iops.rate, iops_burst: iops.burst };
            let group = Group { rates, memory: GroupMemory::create()?, places: BTreeMap::new() };
            groups.insert(id.clone(), group);
        }
        Ok(Self(groups))
    }

    /// Gives a device its place.
    ///
    /// # Errors
    /// The group has none left. That there is a group was checked.
    pub fn join(&mut self, device: &str, name: Option<&str>) -> Result<(), LimitGroupError> {
        let Some(group) = name.and_then(|name| self.0.get_mut(name)) else { return Ok(()) };
        let full =
            || LimitGroupError::Full { device: device.to_owned(), name: name.unwrap_or_default().to_owned() };
        let place = group.memory.join().ok_or_else(full)?;
        group.places.insert(device.to_owned(), place);
        Ok(())
    }

    /// A device is no more.
    pub fn leave(&mut self, device: &str) {
        for group in self.0.values_mut() {
            if let Some(place) = group.places.remove(device) {
                group.memory.leave(place);
            }
        }
    }

    /// What the process of a device is told of its group.
    pub fn config<'a>(&'a self, device: &str, fds: &mut Fds<'a>) -> Option<Box<GroupConfig>> {
        let (group, place) = self.0.values().find_map(|group| Some((group, *group.places.get(device)?)))?;
        let (roll, places) = group.memory.descriptors(place);
        let roll = fds.add_borrowed(roll);
        let places = places.map(|place| fds.add_borrowed(place)).collect();
        Some(Box::new(GroupConfig { rates: group.rates, roll, places, own: u8::try_from(place).ok()? }))
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_ipc::limit_group::MEMBERS;

    use super::*;

    #[test]
    fn places_are_given_kept_and_given_back() {
        let specs = ["id=a,iops=5".parse().unwrap(), "id=b,bps=7".parse().unwrap()];
        let mut groups = LimitGroups::open(&specs).unwrap();
        let own = |groups: &LimitGroups, device: &str| {
            groups.config(device, &mut Fds::default()).map(|config| (config.rates.iops, config.own))
        };
        for number in 0..MEMBERS {
            groups.join(&format!("disk{number}"), Some("a")).unwrap();
        }
        groups.join("net0", Some("b")).unwrap();
        groups.join("disk99", None).unwrap();
        assert_eq!((own(&groups, "disk3"), own(&groups, "net0")), (Some((5, 3)), Some((0, 0))));
        assert_eq!(own(&groups, "disk99"), None);
        let error = groups.join("late", Some("a")).unwrap_err().to_string();
        assert_eq!(error, "late: the limit group 'a' has 16 members, which is the most");
        groups.leave("disk3");
        groups.join("late", Some("a")).unwrap();
        assert_eq!(own(&groups, "late"), Some((5, 3)));
        let mut fds = Fds::default();
        groups.config("late", &mut fds);
        assert_eq!(fds.0.len(), MEMBERS + 1);
    }
}
