//! The gRPC contract of Oncegate: the messages, client and server generated from `proto/`, the limits of their fields, the
//! reasons that its errors carry, and the descriptors that reflection serves.

/// `oncegate.v1`, generated. The meaning of every field and its limits stand in the `.proto` file.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("oncegate.v1");
}

mod codec;
pub mod limits;
pub mod reason;

/// The encoded `FileDescriptorSet` of `oncegate.v1` and what it imports, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
