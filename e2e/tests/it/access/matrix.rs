use anyhow::Result;
use oncegate_e2e::{certificates::Authority, eventually, program::Oncegate};

use super::{
    Guarded,
    caller::{METHODS, attempt, pool},
    identities, token,
};

#[tokio::test]
async fn t46_each_method_by_each_kind_of_caller() -> Result<()> {
    let mut guarded = Guarded::start().await?;
    let directory = guarded.directory.path().to_owned();
    let (url, ca) = (guarded.url.clone(), guarded.ca());
    let certificate = |authority: &Authority, name: &str, expired| -> Result<_> {
        authority
            .client(&format!("spiffe://test/{name}"), expired)?
            .write(&directory, &format!("client-{name}-{expired}"))
    };
    let by_token = |name: &str| pool(&url, &ca, None, Some(&token(name)));
    let by_certificate = |name: &str| pool(&url, &ca, Some(&certificate(&guarded.authority, name, false)?), None);

    // Known, until it is taken out of the file.
    let revoked = by_token("revoked")?;
    assert_eq!(attempt(&revoked, "Stats").await?, '+');
    guarded.tokens.replace(&[("tokens.toml", &identities(false))])?;
    let mut denied = 0;
    eventually("the revoked token is of no use", async || {
        let stats = attempt(&revoked, "Stats").await.ok()?;
        denied += usize::from(stats == 'U');
        (stats == 'U').then_some(())
    })
    .await;

    let wrong_authority = Authority::new()?;
    let expired = certificate(&guarded.authority, "operator", true)?;
    let wrong = certificate(&wrong_authority, "wrong", false)?;
    // In the order of METHODS: claim, extend, mark, mark, history, resolve, stats, cleanup, health, reflection.
    let matrix = [
        ("no credentials", pool(&url, &ca, None, None)?, "UUUUUUUU+U"),
        ("unknown token", by_token("nobody")?, "UUUUUUUU+U"),
        ("expired token", by_token("expired")?, "UUUUUUUU+U"),
        ("revoked token", revoked, "UUUUUUUU+U"),
        ("caller's token", by_token("caller")?, "+++++P+P+P"),
        ("other tenant's token", by_token("other")?, "PPPPPPPP+P"),
        ("operator's token", by_token("operator")?, "PPPP++++++"),
        ("cleanup's token", by_token("cleanup")?, "PPPPPPP++P"),
        ("caller's certificate", by_certificate("caller")?, "+++++P+P+P"),
        ("other tenant's certificate", by_certificate("other")?, "PPPPPPPP+P"),
        ("operator's certificate", by_certificate("operator")?, "PPPP++++++"),
        ("cleanup's certificate", by_certificate("cleanup")?, "PPPPPPP++P"),
        ("certificate of nobody known", by_certificate("stranger")?, "UUUUUUUU+U"),
        ("expired certificate", pool(&url, &ca, Some(&expired), Some(&token("operator")))?, "XXXXXXXXXX"),
        ("certificate of another authority", pool(&url, &ca, Some(&wrong), Some(&token("operator")))?, "XXXXXXXXXX"),
        (
            "client that trusts another authority",
            {
                let other_ca = directory.join("other-ca.pem");
                std::fs::write(&other_ca, wrong_authority.pem())?;
                pool(&url, &other_ca, None, Some(&token("operator")))?
            },
            "XXXXXXXXXX",
        ),
    ];
    for (who, pool, wanted) in matrix {
        let mut found = String::new();
        for method in METHODS {
            let outcome = attempt(&pool, method).await?;
            denied += usize::from(matches!(outcome, 'U' | 'P'));
            found.push(outcome);
        }
        assert_eq!(found, wanted, "{who}\n{METHODS:?}");
    }

    // Each denial has its line, with the method and the reason, and no credentials.
    let lines = || -> Vec<serde_json::Value> {
        let text = guarded.program.output();
        text.lines()
            .filter(|line| line.contains("a call was denied"))
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    };
    eventually("every denial is logged", async || (lines().len() == denied).then_some(())).await;
    for line in lines() {
        let said = line.to_string();
        assert!(said.contains("\"why\"") && said.contains("\"method\"") && said.contains("\"caller\""), "{said}");
    }
    for name in ["cleanup", "operator"] {
        let named = lines().iter().any(|line| line.to_string().contains(&format!("\"{name}\"")));
        assert!(named, "who was denied is said: {name}");
    }
    let finished = guarded.program.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(!finished.stderr.contains("token-of-the-test"), "no token is logged");
    Ok(())
}

#[tokio::test]
async fn listings_are_those_of_the_callers_own_tenant() -> Result<()> {
    use oncegate_api::v1::{StatsRequest, idempotency_service_client::IdempotencyServiceClient};
    let guarded = Guarded::start().await?;
    let stats = async |name: &str, tenant: &str| {
        let mut client = IdempotencyServiceClient::new(pool(&guarded.url, &guarded.ca(), None, Some(&token(name)))?);
        let request = StatsRequest { tenant: tenant.into(), ..Default::default() };
        anyhow::Ok(client.stats(request).await.map(|_| ()).map_err(|status| status.code()))
    };
    let denied = Err(tonic::Code::PermissionDenied);
    // Bound to one tenant: it need not be named. Bound to two: which one has to be said.
    assert_eq!(stats("caller", "").await?, Ok(()));
    assert_eq!(stats("caller", "other").await?, denied);
    assert_eq!(stats("other", "").await?, denied);
    assert_eq!(stats("other", "another").await?, Ok(()));
    assert_eq!(stats("operator", "").await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn others_are_served_only_with_tls_and_identities_or_when_said_out_loud() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new()?;
    let server = authority.server()?.write(directory.path(), "server")?;
    let certificate = server.certificate.to_string_lossy().into_owned();
    let key = server.key.to_string_lossy().into_owned();
    let tokens = directory.path().join("tokens.toml");
    std::fs::write(&tokens, identities(false))?;
    let tokens = tokens.to_string_lossy().into_owned();
    let ca = directory.path().join("ca.pem");
    std::fs::write(&ca, authority.pem())?;
    let ca = ca.to_string_lossy().into_owned();
    let tls = [("SIDECAR_TLS_CERT_FILE", certificate.as_str()), ("SIDECAR_TLS_KEY_FILE", key.as_str())];
    let known = ("SIDECAR_TOKENS_FILE", tokens.as_str());
    for (settings, wanted) in [
        (vec![], "lacks TLS"),
        (tls.to_vec(), "lacks a list of who may call what"),
        // Whoever has a certificate could do everything.
        (vec![tls[0], tls[1], ("SIDECAR_TLS_CLIENT_CA_FILE", &ca)], "lacks a list of who may call what"),
        // A blank is as good as nothing.
        (vec![("SIDECAR_TLS_CERT_FILE", ""), ("SIDECAR_TLS_KEY_FILE", ""), known], "lacks TLS"),
        (vec![tls[0], tls[1], ("SIDECAR_TOKENS_FILE", "")], "lacks a list of who may call what"),
        // Tokens sent in the clear.
        (vec![known], "lacks TLS"),
        (vec![tls[0]], "SIDECAR_TLS_KEY_FILE"),
        (vec![tls[1]], "SIDECAR_TLS_CERT_FILE"),
        (vec![tls[0], ("SIDECAR_TLS_KEY_FILE", &certificate)], "there is no private key in the file"),
        (vec![tls[0], tls[1], ("SIDECAR_TOKENS_FILE", "/nonexistent")], "cannot read /nonexistent"),
        // Known by certificates, and nothing to verify them by.
        (vec![tls[0], tls[1], known], "no SIDECAR_TLS_CLIENT_CA_FILE"),
    ] {
        let mut command = Oncegate::new(directory.path(), ["sidecar"])?.env("SIDECAR_LISTEN", "0.0.0.0:0");
        for (name, value) in settings {
            command = command.env(name, value);
        }
        let finished = command.run().await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(finished.stderr.contains(wanted), "{wanted}: {finished}");
    }
    let mut loud =
        Oncegate::new(directory.path(), ["sidecar", "--insecure"])?.env("SIDECAR_LISTEN", "0.0.0.0:0").start()?;
    loud.address("sidecar").await?;
    assert_eq!(loud.stop().await?.code, Some(0));
    Ok(())
}
