#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| oncegate_inputs::check(oncegate_gateway::fuzzing::certificate_chain, input));
