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

#[cfg(test)]
mod tests {
    /// Whoever writes a client has nothing but these comments.
    #[test]
    fn the_contract_says_of_every_field_and_value_what_it_means() {
        let (mut commented, mut declared, mut bare) = (false, 0, Vec::new());
        for line in include_str!("oncegate/v1/idempotency.proto").lines().map(str::trim) {
            let (code, comment) =
                line.split_once("//").map_or((line, None), |(code, comment)| (code.trim(), Some(comment)));
            let number = code.strip_suffix(';').and_then(|code| code.rsplit(" = ").next());
            if number.is_some_and(|number| number.parse::<u32>().is_ok()) {
                declared += 1;
                if !commented && comment.is_none() {
                    bare.push(line);
                }
            }
            // One above a line is that line's alone.
            commented = code.is_empty() && comment.is_some_and(|comment| !comment.trim().is_empty());
        }
        assert!(declared > 150, "{declared} fields and values are where this test looks");
        assert!(bare.is_empty(), "without a comment: {bare:#?}");
    }
}
