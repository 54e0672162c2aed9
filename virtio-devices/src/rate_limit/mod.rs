//! I/O rate limits of disks and network devices.
//!
//! ```text
//!   bucket    tokens that accrue with time         limiter   two buckets that several queues share
//!   state     saved buckets                        worker/throttle: a queue half that waits for tokens
//! ```
//!
//! A request may start if each bucket has a token, regardless of the request's size. It takes all its tokens when it
//! starts. The bucket may then be in debt, and the next request waits until the debt is repaid. The rate therefore
//! holds on average, the longest request passes a small bucket, and no request waits longer than its predecessor's
//! tokens take to accrue.

mod bucket;
mod limiter;
mod state;

pub use bucket::{Bucket, BucketLimit, REFILL_MAX};
#[cfg(test)]
pub(crate) use limiter::mock;
pub use limiter::{RateLimiter, RateLimits};
pub(crate) use state::RateLimiterState;
