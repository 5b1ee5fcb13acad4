//! Every write path marks exactly its pages, in the bitmap and in the log: no more, no fewer.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::{Direction, DirtyLog, GuestRam, PAGE_SIZE};
use super::{REGIONS, dirty, file, pages_of, ram};

/// A way to write guest memory, or to touch it without writing.
#[derive(Clone, Copy, Debug)]
enum Path {
    ViewBytes,
    ViewTyped,
    ViewStore,
    ViewZero,
    ViewCopyFromFile,
    BytesSlice,
    BytesObject,
    BytesStore,
    BytesReadVolatile,
    LentComplete,
    LentDrop,
    LentRead,
    LentReadFails,
    LentForReading,
    VectorAdvance,
    VectorFail,
    VectorDrop,
    VectorRestart,
    ReadsOnly,
}

const PATHS: [Path; 19] = [
    Path::ViewBytes,
    Path::ViewTyped,
    Path::ViewStore,
    Path::ViewZero,
    Path::ViewCopyFromFile,
    Path::BytesSlice,
    Path::BytesObject,
    Path::BytesStore,
    Path::BytesReadVolatile,
    Path::LentComplete,
    Path::LentDrop,
    Path::LentRead,
    Path::LentReadFails,
    Path::LentForReading,
    Path::VectorAdvance,
    Path::VectorFail,
    Path::VectorDrop,
    Path::VectorRestart,
    Path::ReadsOnly,
];

/// A range in one region, or across the two that adjoin.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let blocks = vec![(REGIONS[0].0, 8 * PAGE_SIZE), (REGIONS[2].0, 5 * PAGE_SIZE)];
    prop::sample::select(blocks).prop_flat_map(|(base, size)| {
        (0..size).prop_flat_map(move |start| {
            // Half of the ranges are short, so that page borders are met closely.
            let short = (size - start).min(24);
            prop_oneof![(Just(base + start), 0..=short), (Just(base + start), 0..=size - start)]
        })
    })
}

/// Writes by one path; answers the pages that must be dirty then. `part` of the range is really moved where a path
/// can move less.
fn write(ram: &GuestRam, path: Path, (address, len): (u64, u64), part: u64) -> BTreeSet<u64> {
    let memory = ram.memory();
    let view = ram.view(address, len, Direction::ReadWrite).unwrap();
    let bytes = vec![0xA5; usize::try_from(len).unwrap()];
    let moved = usize::try_from(part).unwrap();
    let aligned = address & !7;
    let lend = |direction| ram.lend(address, len, direction).unwrap();
    let object_fits = len >= 8;
    match path {
        Path::ViewBytes => view.write_bytes(0, &bytes).unwrap(),
        Path::ViewTyped if object_fits => {
            view.write(len - 8, 7u64).unwrap();
            return pages_of(address + len - 8, 8);
        }
        Path::ViewStore => {
            ram.view(aligned, 8, Direction::Write).unwrap().store(0, 7u64, Ordering::Release).unwrap();
            return pages_of(aligned, 8);
        }
        Path::ViewZero => view.zero(0, len).unwrap(),
        Path::ViewCopyFromFile => view.copy_from_file(0, file(len).as_fd(), 0, len).unwrap(),
        Path::BytesSlice => memory.write_slice(&bytes, GuestAddress(address)).unwrap(),
        Path::BytesObject if object_fits => {
            memory.write_obj([1u8; 8], GuestAddress(address)).unwrap();
            return pages_of(address, 8);
        }
        Path::BytesStore => {
            memory.store(3u16, GuestAddress(aligned), Ordering::Relaxed).unwrap();
            return pages_of(aligned, 2);
        }
        Path::BytesReadVolatile => {
            memory.read_exact_volatile_from(GuestAddress(address), &mut file(len), bytes.len()).unwrap();
        }
        Path::LentComplete => {
            lend(Direction::Write).complete(moved);
            return pages_of(address, part);
        }
        Path::LentDrop => drop(lend(Direction::ReadWrite)),
        Path::LentRead => {
            assert_eq!(lend(Direction::Write).read_at(file(part).as_fd(), 0).unwrap(), moved);
            return pages_of(address, part);
        }
        Path::LentReadFails => {
            let write_only = std::fs::File::options().write(true).open("/dev/null").unwrap();
            lend(Direction::Write).read_at(write_only.as_fd(), 0).unwrap_err();
        }
        Path::LentForReading => {
            drop(lend(Direction::Read));
            lend(Direction::Read).complete(moved);
            return BTreeSet::new();
        }
        Path::VectorAdvance | Path::VectorFail | Path::VectorDrop | Path::VectorRestart => {
            return write_vector(ram, path, (address, len), part);
        }
        Path::ReadsOnly | Path::ViewTyped | Path::BytesObject => {
            let mut copy = bytes.clone();
            view.read_bytes(0, &mut copy).unwrap();
            memory.read_slice(&mut copy, GuestAddress(address)).unwrap();
            memory.load::<u64>(GuestAddress(aligned), Ordering::Acquire).unwrap();
            let mut sink = tempfile::tempfile().unwrap();
            memory.write_all_volatile_to(GuestAddress(address), &mut sink, bytes.len()).unwrap();
            lend(Direction::Read).write_at(sink.as_fd(), 0).unwrap();
            return BTreeSet::new();
        }
    }
    pages_of(address, len)
}

/// Three entries: the range, the last page of RAM, the range's first half.
fn write_vector(ram: &GuestRam, path: Path, (address, len): (u64, u64), part: u64) -> BTreeSet<u64> {
    let last = REGIONS[2].0 + (REGIONS[2].1 - 1) * PAGE_SIZE;
    let entries = [(address, len), (last, PAGE_SIZE), (address, len / 2)];
    let mut vector = ram.lend_vector(Direction::Write);
    for (address, len) in entries {
        vector.push(address, len).unwrap();
    }
    // A refused entry changes nothing.
    vector.push(last, 2 * PAGE_SIZE).unwrap_err();
    let total: u64 = entries.iter().map(|(_, len)| len).sum();
    let mut count = total;
    match path {
        Path::VectorAdvance => {
            let source = file(part);
            let before = vector.len();
            let read = vector.read_at(source.as_fd(), 0).unwrap() as u64;
            assert_eq!(read, part.min(total));
            assert_eq!(vector.len(), before - usize::try_from(read).unwrap());
            // The rest was not touched: a short read ends the operation here.
            vector.complete(0);
            count = read;
        }
        Path::VectorFail => vector.fail(),
        Path::VectorRestart => vector.restart(ram, Direction::Read),
        _ => {}
    }
    assert!(path_keeps(path) || vector.is_empty());
    drop(vector);
    let mut expected = BTreeSet::new();
    for (address, len) in entries {
        let here = count.min(len);
        expected.extend(pages_of(address, here));
        count -= here;
    }
    expected
}

fn path_keeps(path: Path) -> bool {
    matches!(path, Path::VectorDrop)
}

/// The pages whose bits are set in a log file.
fn logged(log: &std::fs::File) -> BTreeSet<u64> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut &*log, &mut bytes).unwrap();
    std::io::Seek::rewind(&mut &*log).unwrap();
    (0..bytes.len() as u64 * 8)
        .filter(|page| bytes[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1)
        .map(|page| page * PAGE_SIZE)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn every_write_path_marks_exactly_its_pages(
        steps in prop::collection::vec((prop::sample::select(&PATHS[..]), range(), 0.0..=1.0f64), 1..8),
    ) {
        let ram = ram();
        let log = file(ram.end().div_ceil(PAGE_SIZE).div_ceil(8));
        let size = log.metadata().unwrap().len();
        ram.set_log(Some(DirtyLog::map(log.try_clone().unwrap().into(), 0, size).unwrap())).unwrap();
        let mut all = BTreeSet::new();
        for (path, range, share) in steps {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
            let part = (range.1 as f64 * share) as u64;
            let expected = write(&ram, path, range, part);
            prop_assert_eq!(dirty(&ram), expected.clone(), "{:?} of {:x?}, {} moved", path, range, part);
            let taken: BTreeSet<_> = ram.take_dirty().pages().collect();
            prop_assert_eq!(&taken, &expected);
            prop_assert!(ram.dirty_pages().is_empty());
            all.extend(expected);
            prop_assert_eq!(logged(&log), all.clone(), "log after {:?}", path);
        }
    }

    #[test]
    fn adding_to_a_used_ring_marks_the_element_and_the_index(
        ring in (0..8 * PAGE_SIZE - 4 - 8 * 256).prop_map(|at| (REGIONS[0].0 + at) & !3),
        heads in prop::collection::vec(0u16..256, 1..40),
    ) {
        let ram = ram();
        let mut queue = Queue::new(256).unwrap();
        queue.set_used_ring_address(Some(u32::try_from(ring).unwrap()), Some(0));
        for (index, head) in (0u64..).zip(heads) {
            queue.add_used(ram.memory(), head, 1).unwrap();
            let mut expected = pages_of(ring + 4 + 8 * (index % 256), 8);
            expected.extend(pages_of(ring + 2, 2));
            prop_assert_eq!(ram.take_dirty().pages().collect::<BTreeSet<_>>(), expected);
        }
    }
}

#[test]
fn bytes_arrive_where_they_were_lent() {
    let ram = ram();
    let mut source = file(0);
    let data: Vec<u8> = (0..=255u8).cycle().take(3 * 4096 + 17).collect();
    source.write_all(&data).unwrap();
    // Across the border of the two regions that adjoin.
    let start = REGIONS[1].0 - 4096 - 5;
    let view = ram.view(start, data.len() as u64, Direction::ReadWrite).unwrap();
    view.copy_from_file(0, source.as_fd(), 0, data.len() as u64).unwrap();
    let mut copy = vec![0; data.len()];
    view.read_bytes(0, &mut copy).unwrap();
    assert_eq!(copy, data);

    let lent = ram.lend(start, data.len() as u64, Direction::Read).unwrap();
    assert_eq!(lent.iovecs().len(), 2);
    let sink = file(0);
    assert_eq!(lent.write_at(sink.as_fd(), 0).unwrap(), data.len());
    assert_eq!(
        std::fs::read(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&sink))).unwrap(),
        data
    );
}

#[test]
fn a_short_read_into_a_vector_continues_where_it_stopped() {
    let ram = ram();
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut vector = ram.lend_vector(Direction::Write);
    vector.push(REGIONS[0].0 + 4090, 12).unwrap();
    vector.push(REGIONS[2].0, 4).unwrap();
    for piece in ["0123", "456789ab", "cdef"] {
        (&near).write_all(piece.as_bytes()).unwrap();
        assert_eq!(vector.read_from(far.as_fd()).unwrap(), piece.len());
    }
    assert!(vector.is_empty());
    vector.complete(0);
    let mut copy = [0; 12];
    ram.memory().read_slice(&mut copy, GuestAddress(REGIONS[0].0 + 4090)).unwrap();
    assert_eq!(&copy, b"0123456789ab");
    assert_eq!(dirty(&ram), BTreeSet::from([REGIONS[0].0, REGIONS[0].0 + 4096, REGIONS[2].0]));
}

#[test]
fn cleared_memory_is_zero_and_marked_and_its_neighbours_are_neither() {
    let ram = ram();
    let backing = ram.regions().next().unwrap().share().unwrap().fd;
    let whole = GuestRam::attach(vec![super::region(0, 16 * PAGE_SIZE, 0, backing)]).unwrap();
    whole.view(0, 16 * PAGE_SIZE, Direction::Write).unwrap().write_bytes(0, &[7; 16 * 4096]).unwrap();
    ram.clear().unwrap();
    assert_eq!(ram.dirty_pages().count(), 13);
    let byte = |page: u64| whole.view(page * PAGE_SIZE, 1, Direction::Read).unwrap().read::<u8>(0).unwrap();
    assert_eq!((byte(0), byte(1), byte(13), byte(14)), (7, 0, 0, 7));
}

#[test]
fn what_a_socket_brings_is_marked_and_what_it_takes_is_not() {
    let ram = ram();
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut vector = ram.lend_vector(Direction::Write);
    vector.push(REGIONS[0].0 + 4090, 12).unwrap();
    vector.push(REGIONS[2].0, 4).unwrap();
    assert_eq!(vector.receive_from(far.as_fd()).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    (&near).write_all(b"0123456789").unwrap();
    assert_eq!(vector.receive_from(far.as_fd()).unwrap(), 10);
    assert!(vector.send_to(far.as_fd()).is_err(), "a list for writing is not read");
    vector.complete(0);
    assert_eq!(dirty(&ram), BTreeSet::from([REGIONS[0].0, REGIONS[0].0 + 4096]));
    ram.take_dirty();

    vector.restart(&ram, Direction::Read);
    vector.push(REGIONS[0].0 + 4092, 6).unwrap();
    assert_eq!(vector.send_to(far.as_fd()).unwrap(), 6);
    assert!(vector.receive_from(far.as_fd()).is_err(), "a list for reading is not written");
    vector.complete(0);
    let mut copy = [0; 6];
    std::io::Read::read_exact(&mut &near, &mut copy).unwrap();
    assert_eq!((&copy, ram.dirty_pages().count()), (b"234567", 0));
    // Nobody reads: an error, and no signal.
    drop(near);
    vector.restart(&ram, Direction::Read);
    vector.push(REGIONS[0].0, 6).unwrap();
    assert_eq!(vector.send_to(far.as_fd()).unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn holes_are_zero_and_marked_and_have_the_length_that_was_asked_for() {
    let ram = ram();
    // Across the border of the two regions that adjoin.
    let start = REGIONS[1].0 - 2 * PAGE_SIZE;
    let view = ram.view(start - PAGE_SIZE, 5 * PAGE_SIZE, Direction::ReadWrite).unwrap();
    view.write_bytes(0, &[7; 5 * 4096]).unwrap();
    ram.take_dirty();
    ram.punch(start, 3 * PAGE_SIZE).unwrap();
    assert_eq!(dirty(&ram), pages_of(start, 3 * PAGE_SIZE));
    let byte = |page: u64| view.read::<u8>(page * PAGE_SIZE).unwrap();
    assert_eq!([byte(0), byte(1), byte(2), byte(3), byte(4)], [7, 0, 0, 0, 7]);
    for (address, len) in
        [(start + 1, PAGE_SIZE), (start, 100), (REGIONS[2].0, 99 * PAGE_SIZE), (!4095, PAGE_SIZE)]
    {
        ram.punch(address, len).unwrap_err();
    }
    assert_eq!(ram.dirty_pages().count(), 3);
}
