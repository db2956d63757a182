//! Lines on their way to standard error: bounded, and written by a thread of their own.
//!
//! Whoever reads a service's log may stop reading while the service lives: a collector that hangs, a container runtime that was
//! stopped. A pipe takes 64 KiB then, and the next write would keep the thread that makes it, with all calls, timers and probes
//! that it serves, for as long as the reader stays away. No webhook is worth less than its log line.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

use crate::metrics::Counter;

/// How much may wait to be written, in bytes: some ten thousand lines. What comes beyond it is lost, and counted.
const WAITING_BYTES_MAX: usize = 4 << 20;
/// A buffer that has grown beyond this is given back when it has been written.
const KEPT_BYTES_MAX: usize = 64 << 10;

/// Lines that nobody took in time.
pub(super) static LOST: Counter = Counter::new();

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// Lines lost since the last that were written.
    lost: u64,
    /// What was taken last is being written.
    writing: bool,
}

/// The queue. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Lines(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    /// There is something to write.
    due: Condvar,
    /// There is not.
    idle: Condvar,
}

impl Lines {
    /// A queue, and the thread that writes what is in it.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(to: impl Write + Send + 'static) -> io::Result<Lines> {
        let lines = Lines(Arc::default());
        let work = lines.clone();
        thread::Builder::new().name("oncegate-log".into()).spawn(move || work.write_on(to))?;
        Ok(lines)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole lines are added and taken under it; nothing there can panic half-way.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.waiting.len() + line.len() > WAITING_BYTES_MAX {
            state.lost += 1;
            LOST.add();
            return;
        }
        let due = state.waiting.is_empty();
        state.waiting.extend_from_slice(line);
        drop(state);
        if due {
            self.0.due.notify_one();
        }
    }

    fn write_on(&self, mut to: impl Write) {
        let mut taken = Vec::new();
        loop {
            let idle = |state: &mut State| state.waiting.is_empty();
            let mut state = self.0.due.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut state.waiting, &mut taken);
            let lost = std::mem::take(&mut state.lost);
            state.writing = true;
            drop(state);
            // Nobody is left who could be told of an error.
            let _ = to.write_all(&taken).and_then(|()| to.flush());
            taken.clear();
            taken.shrink_to(KEPT_BYTES_MAX);
            if lost > 0 {
                // It is the next in the queue.
                tracing::warn!(lines = lost, "the log was not read as fast as it was written; lines were lost");
            }
            let mut state = self.lock();
            state.writing = false;
            if state.waiting.is_empty() {
                self.0.idle.notify_all();
            }
        }
    }

    /// Waits until all that is there has been written, at most for so long.
    pub(super) fn flush(&self, limit: Duration) {
        let busy = |state: &mut State| state.writing || !state.waiting.is_empty();
        let _ended = self.0.idle.wait_timeout_while(self.lock(), limit, busy);
    }
}

/// Takes one line, which comes in one piece.
pub(super) struct Line<'a>(&'a Lines);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A reader that takes nothing until it is told to.
    struct Stalled {
        begun: mpsc::Sender<()>,
        go_on: mpsc::Receiver<()>,
        read: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.begun.send(()).unwrap();
            self.go_on.recv().unwrap();
            self.read.send(bytes.to_vec()).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The other end of it.
    struct Reader {
        is_begun: mpsc::Receiver<()>,
        resume: mpsc::Sender<()>,
        was_read: mpsc::Receiver<Vec<u8>>,
    }

    fn stalled() -> (Lines, Reader) {
        let (begun, is_begun) = mpsc::channel();
        let (resume, go_on) = mpsc::channel();
        let (read, was_read) = mpsc::channel();
        (Lines::start(Stalled { begun, go_on, read }).unwrap(), Reader { is_begun, resume, was_read })
    }

    #[test]
    fn nobody_waits_for_a_reader_that_has_stopped_and_what_is_lost_is_counted() {
        let (lines, Reader { is_begun, resume, was_read }) = stalled();
        let line = |number: usize| format!("{number:>1023}\n");
        lines.push(line(0).as_bytes());
        is_begun.recv().unwrap();
        let lost = LOST.get();
        // The first is with the reader. As many as there is room for wait, and three are lost.
        let room = WAITING_BYTES_MAX / line(0).len();
        for number in 1..=room + 3 {
            lines.push(line(number).as_bytes());
        }
        lines.flush(Duration::from_millis(1));
        resume.send(()).unwrap();
        assert_eq!(was_read.recv().unwrap(), line(0).as_bytes());
        is_begun.recv().unwrap();
        resume.send(()).unwrap();
        let rest = String::from_utf8(was_read.recv().unwrap()).unwrap();
        let numbers: Vec<usize> = rest.lines().map(|line| line.trim().parse().unwrap()).collect();
        assert!(numbers.into_iter().eq(1..=room));
        assert_eq!(LOST.get() - lost, 3);
    }

    #[test]
    fn the_last_lines_are_waited_for() {
        let (lines, Reader { is_begun: _is_begun, resume, was_read }) = stalled();
        lines.push(b"last\n");
        resume.send(()).unwrap();
        lines.flush(Duration::MAX);
        assert_eq!(was_read.try_recv().unwrap(), b"last\n");
    }
}
