//! `bulkhead stats NAME`: what the devices of a machine have counted.

use std::fmt::Write;

use bulkhead_ipc::metrics::Counters;
use serde::Serialize;

use super::api::client::{ClientError, Connection};
use super::api::{DeviceStats, Request, Response};
use super::cli::StatsArgs;

/// The answer of a machine.
///
/// # Errors
/// [`ClientError`].
pub fn ask(connection: &Connection) -> Result<Vec<DeviceStats>, ClientError> {
    match connection.ask(&Request::Stats, None)? {
        Response::Stats { devices } => Ok(devices),
        other => Err(ClientError::Answer(format!("{other:?}"))),
    }
}

/// The text for standard output.
///
/// # Errors
/// [`ClientError`].
pub fn stats(args: &StatsArgs) -> Result<String, ClientError> {
    let devices = ask(&Connection::to_name(&args.name)?)?;
    Ok(if args.json {
        /// A machine.
        #[derive(Serialize)]
        struct Machine<'a> {
            machine: &'a str,
            devices: &'a [DeviceStats],
        }
        let machine = Machine { machine: &args.name, devices: &devices };
        format!("{}\n", serde_json::to_string_pretty(&machine).unwrap_or_default())
    } else if args.prometheus {
        prometheus(&args.name, &devices)
    } else {
        table(&devices)
    })
}

/// A time below which so many of a hundred requests stayed, in µs; `None` before the first.
#[must_use]
pub fn percentile(counters: &Counters, percent: u64) -> Option<u64> {
    let all = counters.histogram.iter().fold(0_u64, |sum, count| sum.wrapping_add(*count));
    let wanted = u128::from(all) * u128::from(percent);
    let mut below = 0_u128;
    for (bits, count) in counters.histogram.iter().enumerate() {
        below += u128::from(*count);
        if all > 0 && below * 100 >= wanted {
            return u32::try_from(bits).ok().and_then(|bits| 1_u64.checked_shl(bits));
        }
    }
    None
}

fn micros(counters: &Counters, percent: u64) -> String {
    percentile(counters, percent).map_or_else(|| "-".to_owned(), |time| format!("<{time}"))
}

fn table(devices: &[DeviceStats]) -> String {
    let mut text = format!(
        "{:<16} {:>12} {:>14} {:>14} {:>7} {:>6} {:>9} {:>9} {:>12} {:>12} {:>8}\n",
        "DEVICE",
        "REQUESTS",
        "TO_GUEST",
        "FROM_GUEST",
        "ERRORS",
        "DEPTH",
        "P50_US",
        "P99_US",
        "INTERRUPTS",
        "SUPPRESSED",
        "RESTARTS"
    );
    for DeviceStats { id, restarts, counters, .. } in devices {
        let Some(counters) = counters else {
            let _infallible = writeln!(text, "{id:<16} {:>12} {restarts:>99}", "-");
            continue;
        };
        let _infallible = writeln!(
            text,
            "{id:<16} {:>12} {:>14} {:>14} {:>7} {:>6} {:>9} {:>9} {:>12} {:>12} {restarts:>8}",
            counters.requests,
            counters.bytes_to_driver,
            counters.bytes_from_driver,
            counters.errors,
            counters.in_flight,
            micros(counters, 50),
            micros(counters, 99),
            counters.interrupts,
            counters.interrupts_suppressed,
        );
    }
    text
}

/// A family of numbers, one for each device.
type Family = (&'static str, &'static str, &'static str, fn(&Counters) -> u64);

const FAMILIES: &[Family] = &[
    ("requests_total", "counter", "Requests finished.", |it| it.requests),
    ("to_guest_bytes_total", "counter", "Bytes that went to the guest.", |it| it.bytes_to_driver),
    ("from_guest_bytes_total", "counter", "Bytes that came from the guest.", |it| it.bytes_from_driver),
    ("errors_total", "counter", "Requests that failed.", |it| it.errors),
    ("in_flight", "gauge", "Requests taken and not finished.", |it| it.in_flight),
    ("interrupts_total", "counter", "Times the guest was interrupted.", |it| it.interrupts),
    ("interrupts_suppressed_total", "counter", "Times the guest did not want to be interrupted.", |it| {
        it.interrupts_suppressed
    }),
];

/// The text format of Prometheus, version 0.0.4. Names of machines and devices need no escape: they have letters, digits, `.`, `_`
/// and `-`.
fn prometheus(machine: &str, devices: &[DeviceStats]) -> String {
    let mut text = String::new();
    let counted = || devices.iter().filter_map(|device| Some((device, device.counters.as_ref()?)));
    let label = |device: &DeviceStats| {
        format!("machine=\"{machine}\",device=\"{}\",type=\"{}\"", device.id, device.role.name())
    };
    for (name, kind, help, value) in FAMILIES {
        let _infallible =
            writeln!(text, "# HELP bulkhead_device_{name} {help}\n# TYPE bulkhead_device_{name} {kind}");
        for (device, counters) in counted() {
            let _infallible =
                writeln!(text, "bulkhead_device_{name}{{{}}} {}", label(device), value(counters));
        }
    }
    text.push_str("# HELP bulkhead_device_restarts_total Times the device's process was replaced.\n");
    text.push_str("# TYPE bulkhead_device_restarts_total counter\n");
    for device in devices {
        let _infallible =
            writeln!(text, "bulkhead_device_restarts_total{{{}}} {}", label(device), device.restarts);
    }
    text.push_str("# HELP bulkhead_device_latency_seconds Time from the taking of a request to its end.\n");
    text.push_str("# TYPE bulkhead_device_latency_seconds histogram\n");
    for (device, counters) in counted() {
        histogram(&mut text, &label(device), counters);
    }
    text
}

/// Buckets of Prometheus count all that is below their bound; the last of ours has none.
fn histogram(text: &mut String, label: &str, counters: &Counters) {
    const NAME: &str = "bulkhead_device_latency_seconds";
    let mut below = 0_u64;
    let bounded = counters.histogram.len().saturating_sub(1);
    for (bits, count) in counters.histogram.iter().take(bounded).enumerate() {
        below = below.wrapping_add(*count);
        let bound = u32::try_from(bits).ok().and_then(|bits| 1_u64.checked_shl(bits)).unwrap_or(u64::MAX);
        let bound = format!("{}.{:06}", bound / 1_000_000, bound % 1_000_000);
        let _infallible = writeln!(text, "{NAME}_bucket{{{label},le=\"{bound}\"}} {below}");
    }
    below = below.wrapping_add(counters.histogram.last().copied().unwrap_or(0));
    let (seconds, rest) = (counters.latency_ns / 1_000_000_000, counters.latency_ns % 1_000_000_000);
    let _infallible = writeln!(
        text,
        "{NAME}_bucket{{{label},le=\"+Inf\"}} {below}\n{NAME}_sum{{{label}}} {seconds}.{rest:09}\n{NAME}_count{{{label}}} {below}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::process::Role;

    fn disk() -> DeviceStats {
        let mut histogram = vec![0; 24];
        (histogram[3], histogram[10]) = (98, 2);
        let counters = Counters {
            requests: 100,
            errors: 1,
            latency_ns: 1_500_000_000,
            histogram,
            ..Counters::default()
        };
        DeviceStats { id: "disk0".into(), role: Role::Blk, restarts: 2, counters: Some(counters) }
    }

    #[test]
    fn percentiles_are_bounds_of_buckets() {
        let counters = disk().counters.unwrap();
        assert_eq!(
            [50, 98, 99].map(|percent| percentile(&counters, percent)),
            [Some(8), Some(8), Some(1024)]
        );
        assert_eq!(percentile(&Counters::default(), 50), None);
    }

    #[test]
    fn prometheus_reads_cumulative_buckets() {
        let text = prometheus("web", &[disk()]);
        let label = "machine=\"web\",device=\"disk0\",type=\"blk\"";
        for line in [
            format!("bulkhead_device_requests_total{{{label}}} 100"),
            format!("bulkhead_device_restarts_total{{{label}}} 2"),
            format!("bulkhead_device_latency_seconds_bucket{{{label},le=\"0.000004\"}} 0"),
            format!("bulkhead_device_latency_seconds_bucket{{{label},le=\"0.000008\"}} 98"),
            format!("bulkhead_device_latency_seconds_bucket{{{label},le=\"+Inf\"}} 100"),
            format!("bulkhead_device_latency_seconds_sum{{{label}}} 1.500000000"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        // Each family is described once, before its numbers.
        assert_eq!(text.matches("# TYPE ").count(), text.matches("# HELP ").count());
    }

    #[test]
    fn hostile_numbers_break_no_table() {
        let counters = Counters {
            requests: u64::MAX,
            bytes_to_driver: u64::MAX,
            in_flight: u64::MAX,
            latency_ns: u64::MAX,
            histogram: vec![u64::MAX; 24],
            ..Counters::default()
        };
        let device = DeviceStats { counters: Some(counters), ..disk() };
        assert_eq!(table(std::slice::from_ref(&device)).lines().count(), 2);
        assert!(prometheus("web", &[device]).contains("+Inf"));
        let uart = DeviceStats { counters: None, ..disk() };
        assert!(table(&[uart]).contains('-'));
    }
}
