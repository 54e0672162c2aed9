//! Finds VMs and samples each of them on its own thread.
//!
//! Every VM has one thread, which is the only one that ever talks to that VM: that is the rule "one request in flight a
//! VM", and it is why a VMM that hangs delays nobody but itself. A thread blocked in a read costs a few pages of stack
//! and no processor time (decision 9).

mod counters;
mod discovery;
mod process;
mod reading;
mod worker;

pub use counters::{DURATION_BUCKETS_SECONDS, RequestCount, RequestCounters};
pub use discovery::{Discovery, Found, PatternError, SocketIdentity, VMS_MAX};
pub use reading::{SampleFailure, VmReading};
pub use worker::{Order, OrderDone, OrderError, VmEvent, VmEventKind, VmWorker, WorkerSettings};
