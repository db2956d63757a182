//! The process itself, under the names that Prometheus' own clients use, and what became of its traces. Read from
//! Linux's `/proc`; elsewhere unknown values have no row.

use std::{
    fs,
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{Family, Page};
use crate::{idle, logging, telemetry};

const BUILD: Family = Family::gauge("oncegate_build_info", &["version"], "1, with the version of the program.");
const START: Family =
    Family::gauge("process_start_time_seconds", &[], "When the process started, in seconds since 1970.");
const RESIDENT: Family = Family::gauge("process_resident_memory_bytes", &[], "Memory in use.");
const CPU: Family = Family::counter("process_cpu_seconds_total", &[], "Processor time used.");
const IDLE_POLL: Family = Family::counter(
    "oncegate_idle_poll_seconds_total",
    &[],
    "About the part of that with nothing to do, in which threads looked for work before they slept (ONCEGATE_IDLE_POLL).",
);
const FDS: Family = Family::gauge("process_open_fds", &[], "File descriptors in use.");
const FDS_MAX: Family = Family::gauge("process_max_fds", &[], "File descriptors permitted.");
const SPANS_EXPORTED: Family =
    Family::counter("oncegate_trace_spans_exported_total", &[], "Spans that the collector has taken.");
const SPANS_DROPPED: Family = Family::counter(
    "oncegate_trace_spans_dropped_total",
    &["reason"],
    "Spans that were lost: queue_full, the collector is too slow or away; export_failed, it did not take them.",
);
const LINES_LOST: Family = Family::counter(
    "oncegate_log_lines_lost_total",
    &[],
    "Log lines that were lost because whoever reads standard error did not take them in time.",
);

/// All of them.
pub const FAMILIES: &[&Family] =
    &[&BUILD, &START, &RESIDENT, &CPU, &IDLE_POLL, &FDS, &FDS_MAX, &SPANS_EXPORTED, &SPANS_DROPPED, &LINES_LOST];

/// To be called once at the start, so that the start time is known where the system does not provide it.
pub fn start() {
    start_time();
}

fn start_time() -> f64 {
    static START_TIME: OnceLock<f64> = OnceLock::new();
    *START_TIME.get_or_init(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()))
}

/// Writes the metrics of the process.
pub fn render(page: &mut Page) {
    page.family(&BUILD).row(&[env!("CARGO_PKG_VERSION")], 1_u64);
    page.single(&START, start_time());
    if let Some((resident, cpu)) = usage() {
        page.single(&RESIDENT, resident);
        page.single(&CPU, cpu);
    }
    page.single(&IDLE_POLL, idle::polled().as_secs_f64());
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // The directory being listed is open too.
        page.single(&FDS, open.count().saturating_sub(1));
    }
    if let Some(permitted) = permitted_fds() {
        page.single(&FDS_MAX, permitted);
    }
    let spans = telemetry::spans();
    page.single(&SPANS_EXPORTED, &spans.exported);
    let mut dropped = page.family(&SPANS_DROPPED);
    dropped.row(&["queue_full"], &spans.queue_full);
    dropped.row(&["export_failed"], &spans.export_failed);
    page.single(&LINES_LOST, logging::lost());
}

/// Resident bytes and processor seconds, from `/proc/self/stat` (proc_pid_stat(5)).
fn usage() -> Option<(u64, f64)> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name in brackets, which may hold blanks.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let ticks = field(14)? + field(15)?;
    // The unit the kernel shows to programs is 1/100 s on every architecture; page sizes differ, so the bytes come
    // from elsewhere.
    #[expect(clippy::cast_precision_loss, reason = "exact for thousands of years")]
    let cpu = ticks as f64 / 100.0;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = resident.split_whitespace().next()?.parse().ok()?;
    Some((kibibytes * 1_024, cpu))
}

fn permitted_fds() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_process_has_a_size() {
        let (resident, _) = usage().unwrap();
        assert!(resident > 100_000);
        assert!(permitted_fds().unwrap() > 2);
    }
}
