//! I/O rate limits of disks and network devices.
//!
//! ```text
//!   bucket    tokens that accrue with time         limiter   two buckets that several queues share
//!   state     saved buckets                        worker/throttle: a queue half that waits for tokens
//! ```
//!
//! A request starts while each bucket has a token, whatever the request's size, and takes all its tokens at once. The
//! bucket may be in debt then, and the next request waits until the debt is repaid. So the rate holds on average, the
//! longest request passes a small bucket, and no request waits longer than the one before it is worth.

mod bucket;
mod limiter;
mod state;

pub use bucket::{Bucket, BucketLimit, REFILL_MAX};
#[cfg(test)]
pub(crate) use limiter::mock;
pub use limiter::{RateLimiter, RateLimits};
pub(crate) use state::RateLimiterState;
