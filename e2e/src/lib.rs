//! The harness of the tests that use everything for real: database servers, the built binary, sockets, an application.
//!
//! Nothing here is mocked. A missing server is a failure that says what to install, never a skipped test.

pub mod certificates;
pub mod chaos;
pub mod clock;
pub mod collector;
pub mod eventually;
pub mod grow;
pub mod http_client;
pub mod postgres;
pub mod program;
pub mod prometheus;
pub mod proxy;
pub mod redis;
pub mod redis_many;
pub mod secrets;
pub mod signers;
pub mod stripe;
pub mod supervised;
pub mod upstream;
pub mod wire;

pub use eventually::{DEADLINE, eventually, within};
