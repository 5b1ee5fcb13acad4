//! A limit that several devices share, each in a process that trusts no other (`bulkhead_ipc::limit_group`).
//!
//! A bucket is one number, the moment when it is full again: taking tokens moves it on by the time that the rate needs for them,
//! and they are there while it lies no further ahead than the bucket is deep. Every member publishes that moment as it knows it, and the
//! time that it has used in all. The latest moment counts, and so does all that was used: two that take in the same instant do not know
//! of each other's moment, and find out by the sum.
//!
//! Who lies can say that the bucket is empty, and no more. So each member has a bucket of its own beside it, of its fair share
//! of the rate and not deep, and may take what is in either. Both are charged for everything, but the share is never charged
//! below empty for what the group had: nobody has to pay later for a surplus that nobody else wanted.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bulkhead_ipc::limit_group::{GroupView, MEMBERS, Tokens, Word};
use nix::time::{ClockId, clock_gettime};

use super::{Rate, RateLimits};

const SECOND: u64 = 1_000_000_000;
/// How deep a fair share is, ns: what a member may have beyond it when it comes back from a pause.
const SHARE_DEPTH: u64 = 10_000_000;
/// No member can say of the bucket that it is full later than so far after it was empty, ns; a single request may take that long.
const LONGEST_DEBT: u64 = 60 * SECOND;

/// The limit of a group, as one member sees it.
#[derive(Debug)]
pub struct Group(Mutex<Member>);

#[derive(Debug)]
struct Member {
    view: GroupView,
    bandwidth: Option<Shared>,
    operations: Option<Shared>,
}

impl Group {
    /// The group behind `view`, whose members may together use so much.
    #[must_use]
    pub fn new(limits: RateLimits, view: GroupView) -> Self {
        let bandwidth = Shared::new(limits.bandwidth, Tokens::Bandwidth, &view);
        let operations = Shared::new(limits.operations, Tokens::Operations, &view);
        Self(Mutex::new(Member { view, bandwidth, operations }))
    }

    /// Takes one operation of `bytes`.
    ///
    /// # Errors
    /// How long until it can be taken, if nobody else takes before.
    pub fn try_take(&self, bytes: u64) -> Result<(), Duration> {
        // The same clock in all processes. It cannot fail.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).try_take(bytes, now)
    }
}

impl Member {
    fn try_take(&mut self, bytes: u64, now: u64) -> Result<(), Duration> {
        let Self { view, bandwidth, operations } = self;
        let both = [(bandwidth, bytes), (operations, 1)];
        let mut both = both.map(|(shared, tokens)| shared.as_mut().map(|shared| (shared, tokens)));
        let waits = both.iter_mut().flatten().map(|(shared, tokens)| shared.wait(view, *tokens, now));
        match waits.max() {
            None | Some(0) => {}
            Some(wait) => return Err(Duration::from_nanos(wait)),
        }
        for (shared, tokens) in both.into_iter().flatten() {
            shared.take(view, tokens, now);
        }
        Ok(())
    }
}

/// One kind of tokens. Moments and times are nanoseconds.
#[derive(Debug)]
struct Shared {
    kind: Tokens,
    /// Tokens a second.
    rate: u64,
    /// The time that the rate needs to fill an empty bucket.
    depth: u64,
    /// When the bucket is full again by all that was used while this member looked on.
    full_at: u64,
    /// The same by what members say.
    said: u64,
    /// What this member and its predecessors have used.
    used: u64,
    /// What those in the other places had used when they were looked at last.
    seen: [u64; MEMBERS],
    /// When the fair share is full again.
    share_full_at: u64,
    /// Parts of a nanosecond that were not charged yet, in 1/rate.
    rest: u64,
}

impl Shared {
    fn new(Rate { rate, burst }: Rate, kind: Tokens, view: &GroupView) -> Option<Self> {
        let depth = if burst == 0 { SECOND / 10 } else { time(burst, 0, rate.max(1)).0 };
        let seen = std::array::from_fn(|place| view.used(place, kind));
        let Word { used, full_at } = view.own(kind);
        let said = full_at;
        let (share_full_at, rest) = (0, 0);
        (rate != 0).then_some(Self { kind, rate, depth, full_at, said, used, seen, share_full_at, rest })
    }

    /// Looks at what the others say.
    fn look(&mut self, view: &GroupView, now: u64) {
        let most = self.depth.saturating_add(LONGEST_DEBT);
        let latest = now.saturating_add(most);
        self.said = view.own(self.kind).full_at;
        for (place, seen) in self.seen.iter_mut().enumerate() {
            let Some(Word { used, full_at }) = view.other(place, self.kind) else { continue };
            let more = used.wrapping_sub(*seen).min(most);
            *seen = used;
            self.full_at = self.full_at.saturating_add(more);
            self.said = self.said.max(full_at);
        }
        self.full_at = self.full_at.clamp(now, latest);
        self.said = self.said.clamp(self.full_at, latest);
    }

    /// The time until `tokens` can be taken, from either bucket.
    fn wait(&mut self, view: &GroupView, tokens: u64, now: u64) -> u64 {
        if tokens == 0 {
            return 0;
        }
        self.look(view, now);
        let (time, _) = time(tokens, 0, self.rate);
        let share = missing(self.share_full_at, self.of_share(view, time), SHARE_DEPTH, now);
        self.group_lacks(tokens, now).min(share)
    }

    /// The time until `tokens` can be taken from the group's bucket, by what was said when it was looked at last.
    fn group_lacks(&self, tokens: u64, now: u64) -> u64 {
        let (time, _) = time(tokens, 0, self.rate);
        missing(self.said, time, self.depth, now)
    }

    /// The time that a member's share of the rate needs for what the rate needs so much for.
    fn of_share(&self, view: &GroupView, time: u64) -> u64 {
        time.saturating_mul(view.members().into())
    }

    /// Takes `tokens`, after [`Self::wait`] has found them.
    fn take(&mut self, view: &GroupView, tokens: u64, now: u64) {
        if tokens == 0 {
            // It has not looked, and would say what it knew long ago.
            return;
        }
        let (time, rest) = time(tokens, self.rest, self.rate);
        self.rest = rest;
        let from_group = self.group_lacks(tokens, now) == 0;
        self.used = self.used.wrapping_add(time);
        self.full_at = self.full_at.saturating_add(time);
        let full_at = self.said.max(now).saturating_add(time);
        view.say(self.kind, Word { used: self.used, full_at });
        self.said = full_at;

        let charged = self.share_full_at.max(now).saturating_add(self.of_share(view, time));
        let empty = now.saturating_add(SHARE_DEPTH);
        self.share_full_at = if from_group {
            // More than the group can hold is a debt all the same.
            let owed = self.of_share(view, time.saturating_sub(self.depth));
            self.share_full_at.max(charged.min(empty)).saturating_add(owed)
        } else {
            charged
        };
    }
}

/// The time until a bucket so deep, full at that moment, has what needs so much time; more than it can hold it has when it is full.
fn missing(full_at: u64, time: u64, depth: u64, now: u64) -> u64 {
    full_at.max(now).saturating_add(time.min(depth)).saturating_sub(now.saturating_add(depth))
}

/// The time that a rate needs for tokens, and what is left of a nanosecond.
fn time(tokens: u64, rest: u64, rate: u64) -> (u64, u64) {
    let all = u128::from(tokens).saturating_mul(SECOND.into()).saturating_add(rest.into());
    let part = |value: Option<u128>| u64::try_from(value.unwrap_or(0)).unwrap_or(u64::MAX);
    (part(all.checked_div(rate.into())), part(all.checked_rem(rate.into())))
}

#[cfg(test)]
mod tests {
    use std::os::fd::{BorrowedFd, OwnedFd};

    use bulkhead_ipc::limit_group::GroupMemory;
    use proptest::prelude::*;

    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    fn view(memory: &GroupMemory, own: usize) -> GroupView {
        let (roll, places) = memory.descriptors(own);
        let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let places: Vec<OwnedFd> = places.map(owned).collect();
        GroupView::map(&owned(roll), &places, own).unwrap()
    }

    fn member(memory: &GroupMemory, own: usize, limits: RateLimits) -> Member {
        Group::new(limits, view(memory, own)).0.into_inner().unwrap()
    }

    fn join(memory: &GroupMemory, limits: RateLimits) -> Member {
        let place = memory.join().unwrap();
        member(memory, place, limits)
    }

    fn operations(rate: u64, burst: u64) -> RateLimits {
        RateLimits { operations: Rate { rate, burst }, ..RateLimits::default() }
    }

    /// Has the members ask for ever more, each a little later than the one before, and counts what each gets.
    fn contend(members: &mut [Member], from: u64, seconds: u64) -> Vec<u64> {
        let mut got = vec![0; members.len()];
        let mut now = from;
        while now < from + seconds * SECOND {
            for (member, got) in members.iter_mut().zip(&mut got) {
                now += 43_001;
                while member.try_take(0, now).is_ok() {
                    *got += 1;
                }
            }
        }
        got
    }

    #[test]
    fn together_they_have_the_rate_and_each_alone_has_it_too() {
        let memory = GroupMemory::create().unwrap();
        let limits = operations(10_000, 100);
        let mut members = [join(&memory, limits), join(&memory, limits)];
        let got = contend(&mut members, SECOND, 2);
        let total: u64 = got.iter().sum();
        assert!((20_000..=20_300).contains(&total), "{got:?}");
        assert!(got.iter().all(|got| *got > 9_800), "{got:?}");
        let alone = contend(&mut members[..1], 20 * SECOND, 2);
        assert!((20_000..=20_300).contains(&alone[0]), "{alone:?}");
        // The other does not pay for having done nothing, nor this one for having had it all.
        let got = contend(&mut members, 30 * SECOND, 2);
        assert!(got.iter().all(|got| (9_600..10_600).contains(got)), "{got:?}");
    }

    #[test]
    fn a_burst_is_there_once_and_not_for_each() {
        let memory = GroupMemory::create().unwrap();
        let limits = operations(1000, 500);
        let mut members = [join(&memory, limits), join(&memory, limits), join(&memory, limits)];
        // After a pause of any length.
        let now = 1000 * SECOND;
        let got =
            members.each_mut().map(|member| (0..).take_while(|_| member.try_take(0, now).is_ok()).count());
        assert_eq!(got[0], 500);
        // Their shares, 10 ms deep.
        assert!(got[1] <= 4 && got[2] <= 4, "{got:?}");
    }

    #[test]
    fn a_burst_deeper_than_the_longest_debt_is_there_once_too() {
        let memory = GroupMemory::create().unwrap();
        let limits = operations(100, 10_000);
        let mut members = [join(&memory, limits), join(&memory, limits)];
        let now = 1000 * SECOND;
        let got = members
            .each_mut()
            .map(|member| (0..20_000).take_while(|_| member.try_take(0, now).is_ok()).count());
        assert_eq!(got[0], 10_000);
        assert!(got[1] <= 1, "{got:?}");
    }

    #[test]
    fn who_takes_the_place_of_another_is_not_charged_for_it() {
        let memory = GroupMemory::create().unwrap();
        let limits = operations(1000, 100);
        let (mut first, stays) = (join(&memory, limits), memory.join().unwrap());
        let mut other = member(&memory, stays, limits);
        let mut now = SECOND;
        let all =
            |member: &mut Member, now| (0..1000).take_while(|_| member.try_take(0, now).is_ok()).count();
        for restarted in [false, true] {
            assert!(all(&mut first, now) >= 100);
            assert!(all(&mut other, now) <= 5);
            memory.leave(0);
            if restarted {
                // While the place is empty.
                other = member(&memory, stays, limits);
            }
            first = join(&memory, limits);
            now += 2 * SECOND;
            assert!(all(&mut other, now) >= 100, "{restarted}");
            assert!(all(&mut first, now) <= 5, "{restarted}");
            now += 2 * SECOND;
        }
    }

    #[test]
    fn who_lies_takes_the_surplus_and_nobodys_share() {
        let liar = [
            Word { used: u64::MAX, full_at: u64::MAX },
            Word { used: 1, full_at: u64::MAX },
            Word { used: u64::MAX / 2, full_at: 0 },
            Word { used: 0, full_at: 1 },
        ];
        let memory = GroupMemory::create().unwrap();
        let limits = operations(10_000, 100);
        let mut honest = join(&memory, limits);
        let hostile = memory.join().unwrap();
        let said = view(&memory, hostile);
        let (mut got, mut now) = (0_u64, SECOND);
        for word in liar.iter().cycle().take(10_000) {
            said.say(Tokens::Operations, *word);
            now += MILLISECOND / 10;
            while honest.try_take(0, now).is_ok() {
                got += 1;
            }
        }
        assert!(got >= 4_990, "{got}");
        // Once it is gone, what it said is forgotten before long.
        memory.leave(hostile);
        now += 2 * LONGEST_DEBT;
        let alone = contend(std::slice::from_mut(&mut honest), now, 2);
        assert!((20_000..=20_300).contains(&alone[0]), "{alone:?}");
    }

    #[test]
    fn what_the_group_gave_costs_no_more_of_the_share_than_it_holds() {
        let memory = GroupMemory::create().unwrap();
        let bandwidth = Rate { rate: 1_000_000, burst: 0 };
        let mut one = join(&memory, RateLimits { bandwidth, ..RateLimits::default() });
        let other = view(&memory, memory.join().unwrap());
        // Ten times what its share holds, and both buckets are full.
        assert_eq!(one.try_take(50_000, SECOND), Ok(()));
        // The group has nothing more; the share has filled again.
        other.say(Tokens::Bandwidth, Word { used: 0, full_at: u64::MAX });
        let now = SECOND + SHARE_DEPTH;
        assert_eq!(one.try_take(5_000, now), Ok(()));
        // What the share gives beyond its depth is owed.
        assert_eq!(one.try_take(50_000, now), Err(Duration::from_millis(10)));
        let now = now + SHARE_DEPTH;
        assert_eq!(one.try_take(50_000, now), Ok(()));
        assert_eq!(one.try_take(5_000, now), Err(Duration::from_millis(100)));
    }

    #[test]
    fn who_keeps_silent_is_no_burden() {
        let memory = GroupMemory::create().unwrap();
        let limits = operations(1000, 10);
        let mut one = join(&memory, limits);
        for _ in 1..MEMBERS {
            memory.join().unwrap();
        }
        let got = contend(std::slice::from_mut(&mut one), SECOND, 10);
        assert!((9_900..=10_100).contains(&got[0]), "{got:?}");
    }

    #[test]
    fn two_that_took_in_the_same_instant_pay_for_both() {
        let memory = GroupMemory::create().unwrap();
        let limits = operations(1000, 1);
        let mut members = [join(&memory, limits), join(&memory, limits)];
        let mut got = 0;
        for step in 0..10_000 {
            let now = SECOND + step * MILLISECOND;
            // Both look before either says what it took.
            let found = members.each_mut().map(|member| {
                let shared = member.operations.as_mut().unwrap();
                shared.wait(&member.view, 1, now) == 0
            });
            for (member, _) in members.iter_mut().zip(found).filter(|(_, found)| *found) {
                member.operations.as_mut().unwrap().take(&member.view, 1, now);
                got += 1;
            }
        }
        assert!((9_900..=10_100).contains(&got), "{got}");
    }

    #[test]
    fn a_successor_begins_where_its_predecessor_was() {
        let memory = GroupMemory::create().unwrap();
        let limits = operations(1000, 100);
        let mut first = join(&memory, limits);
        let now = SECOND;
        let got = (0..).take_while(|_| first.try_take(0, now).is_ok()).count();
        assert!((100..=110).contains(&got), "{got}");
        let mut successor = member(&memory, 0, limits);
        // No second burst: what its share has, and that is all.
        let got = (0..).take_while(|_| successor.try_take(0, now).is_ok()).count();
        assert!(got <= 11, "{got}");
    }

    #[test]
    fn a_larger_request_than_the_burst_is_paid_for_later() {
        let memory = GroupMemory::create().unwrap();
        let bandwidth = Rate { rate: 1_000_000, burst: 1000 };
        let mut one = join(&memory, RateLimits { bandwidth, ..RateLimits::default() });
        assert_eq!(one.try_take(3_000_000, SECOND), Ok(()));
        let wait = one.try_take(1000, SECOND).unwrap_err();
        assert!((2_900..=3_001).contains(&wait.as_millis()), "{wait:?}");
        assert_eq!(one.try_take(0, SECOND), Ok(()), "nothing costs nothing");
        // And nothing is forgotten for it.
        let owed = one.view.own(Tokens::Bandwidth);
        assert_eq!(owed, Word { used: 3 * SECOND, full_at: 4 * SECOND });
    }

    proptest! {
        /// Whatever honest members ask for, and whenever: no more than the rate's due, the bursts and one request each; and to wait as
        /// told helps whoever is alone.
        #[test]
        fn the_rate_is_never_exceeded(
            rate in 1_000_u64..1_000_000,
            requests in proptest::collection::vec((0_usize..3, 1_u64..5_000, 0_u64..5_000_000), 1..120),
        ) {
            let memory = GroupMemory::create().unwrap();
            let limits = RateLimits { bandwidth: Rate { rate, burst: 0 }, ..RateLimits::default() };
            let mut members = [join(&memory, limits), join(&memory, limits), join(&memory, limits)];
            let (begin, mut now, mut total, mut largest) = (SECOND, SECOND, 0_u128, 0_u128);
            for (who, bytes, pause) in requests {
                now += pause;
                if let Err(wait) = members[who].try_take(bytes, now) {
                    now += u64::try_from(wait.as_nanos()).unwrap();
                    prop_assert_eq!(members[who].try_take(bytes, now), Ok(()));
                }
                total += u128::from(bytes);
                largest = largest.max(bytes.into());
            }
            let due = u128::from(now - begin) * u128::from(rate) / u128::from(SECOND);
            let burst = u128::from(rate) / 10;
            prop_assert!(total <= due + 2 * burst + 4 * largest + 1, "{total} {due}");
        }

        /// Any words at all: no panic, and never a longer wait than the fair share needs.
        #[test]
        fn no_word_makes_a_member_wait_longer_than_its_share_would(
            words in proptest::collection::vec((any::<u64>(), any::<u64>(), 0_u64..SECOND), 1..50),
        ) {
            let memory = GroupMemory::create().unwrap();
            let limits = operations(1000, 0);
            let mut one = join(&memory, limits);
            let said = view(&memory, memory.join().unwrap());
            let mut now = u64::MAX / 4;
            for (used, full_at, pause) in words {
                said.say(Tokens::Operations, Word { used, full_at });
                now += pause;
                if let Err(wait) = one.try_take(0, now) {
                    prop_assert!(wait <= Duration::from_millis(2), "{wait:?}");
                }
            }
        }
    }
}
