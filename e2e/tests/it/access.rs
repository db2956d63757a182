//! Who may call what (T46), with the built program, its TLS, tokens and client certificates; and certificates that change
//! while calls go on.

mod audit;
mod caller;
mod gateway_rotation;
mod matrix;
mod quota;
mod reach;
mod rotation;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    certificates::{Authority, Projected},
    program::{Oncegate, Running},
};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

/// A sidecar that speaks TLS, knows tokens and certificates, and looks at its files every few milliseconds.
pub(crate) struct Guarded {
    pub(crate) program: Running,
    /// `https://localhost:PORT`.
    pub(crate) url: String,
    authority: Authority,
    tls: Projected,
    tokens: Projected,
    // Ends after the program that uses it.
    directory: TempDir,
}

/// The token of an identity of the tests.
fn token(name: &str) -> String {
    format!("token-of-the-test-for-{name}")
}

/// The file with identities. The first two are given as digests, as an operator would; the revoked one may be left out.
fn identities(with_revoked: bool) -> String {
    let digest = |name: &str| hex::encode(Sha256::digest(token(name)));
    let mut text = format!(
        r#"
        [[identity]]
        name = "caller"
        role = "caller"
        tenants = ["default"]
        token_sha256 = "{}"
        certificates = ["uri:spiffe://test/caller"]

        [[identity]]
        name = "operator"
        role = "operator"
        token_sha256 = ["{}"]
        certificates = ["uri:spiffe://test/operator"]

        [[identity]]
        name = "cleanup"
        role = "cleanup"
        token = "{}"
        certificates = ["uri:spiffe://test/cleanup"]

        [[identity]]
        name = "other"
        role = "caller"
        tenants = ["other", "another"]
        token = "{}"
        certificates = ["uri:spiffe://test/other"]

        [[identity]]
        name = "bench"
        role = "caller"
        tenants = ["bench"]
        token = "{}"
        certificates = ["uri:spiffe://test/bench"]

        [[identity]]
        name = "expired"
        role = "operator"
        token = "{}"
        expires = 2020-01-01T00:00:00Z
        "#,
        digest("caller"),
        digest("operator"),
        token("cleanup"),
        token("other"),
        token("bench"),
        token("expired"),
    );
    if with_revoked {
        text.push_str(&format!(
            "\n[[identity]]\nname = \"revoked\"\nrole = \"operator\"\ntoken = \"{}\"",
            token("revoked")
        ));
    }
    text
}

impl Guarded {
    pub(crate) async fn start() -> Result<Self> {
        Self::start_with(|command| command).await
    }

    /// With settings beside those that every test has.
    async fn start_with(settings: impl FnOnce(Oncegate) -> Oncegate) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let authority = Authority::new()?;
        let server = authority.server()?;
        let tls = Projected::new(
            &directory.path().join("tls"),
            &[("tls.crt", &server.certificate), ("tls.key", &server.key), ("ca.crt", authority.pem())],
        )?;
        let tokens = Projected::new(&directory.path().join("tokens"), &[("tokens.toml", &identities(true))])?;
        let command = Oncegate::new(directory.path(), ["sidecar"])?
            .env("SIDECAR_LISTEN", "127.0.0.1:0")
            .env("SIDECAR_TLS_CERT_FILE", tls.path("tls.crt").to_string_lossy())
            .env("SIDECAR_TLS_KEY_FILE", tls.path("tls.key").to_string_lossy())
            .env("SIDECAR_TLS_CLIENT_CA_FILE", tls.path("ca.crt").to_string_lossy())
            .env("SIDECAR_TLS_CLIENT_AUTH", "optional")
            .env("SIDECAR_TOKENS_FILE", tokens.path("tokens.toml").to_string_lossy())
            .env("SIDECAR_ACCESS_RELOAD", "20ms")
            .env("ADMIN_LISTEN", "127.0.0.1:0");
        let mut program = settings(command).start()?;
        let address = program.address("sidecar").await?;
        let url = format!("https://localhost:{}", address.port());
        fs::write(directory.path().join("ca.pem"), authority.pem())?;
        Ok(Self { program, url, authority, tls, tokens, directory })
    }

    /// What a client trusts.
    pub(crate) fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// A file with a token.
    pub(crate) fn token_file(&self, name: &str) -> Result<String> {
        let path = self.directory.path().join(format!("{name}.token"));
        fs::write(&path, format!("{}\n", token(name)))?;
        path.to_str().map(str::to_owned).context("a path of letters")
    }
}
