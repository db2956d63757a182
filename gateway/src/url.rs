//! URLs in settings, read more strictly than by `http::Uri`: that drops a fragment silently, and takes a port that is not a
//! number for none, so that whatever listens on the scheme's default port would get what was meant for somebody else.

use std::str::FromStr as _;

use http::Uri;

/// What is wrong with a URL. Never holds any part of it: even a misspelt one may contain a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadUrl {
    #[error("is not a URL")]
    NotAUrl,
    #[error("may hold no fragment (#): it would be dropped")]
    Fragment,
    #[error("names no host")]
    NoHost,
    #[error("may hold no user name or password: they would end up in logs")]
    Credentials,
    #[error("has no port number, 1 to 65535, after its colon")]
    Port,
}

/// Reads a URL, which needs a scheme and a host, and the port that it names, if any.
pub(crate) fn parse(text: &str) -> Result<(Uri, Option<u16>), BadUrl> {
    let text = text.trim();
    let uri = Uri::from_str(text).map_err(|_| BadUrl::NotAUrl)?;
    let (Some(authority), Some(_)) = (uri.authority(), uri.scheme()) else { return Err(BadUrl::NotAUrl) };
    if authority.as_str().contains('@') {
        return Err(BadUrl::Credentials);
    }
    if text.contains('#') {
        return Err(BadUrl::Fragment);
    }
    if authority.host().is_empty() {
        return Err(BadUrl::NoHost);
    }
    let port = match authority.as_str().rsplit_once(':') {
        // An IPv6 address has colons too, but only before its closing bracket.
        Some((_, port)) if !port.ends_with(']') => {
            Some(port.parse().ok().filter(|port| *port > 0).ok_or(BadUrl::Port)?)
        }
        _ => None,
    };
    Ok((uri, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_mean_what_they_say_or_are_refused() {
        for (text, wanted) in [
            ("http://app:3000/hook?key=a", Ok(Some(3000))),
            (" https://app/hook ", Ok(None)),
            ("http://[::1]/", Ok(None)),
            ("http://[::1]:81/", Ok(Some(81))),
            ("http://app:/hook", Err(BadUrl::Port)),
            ("http://app:0/hook", Err(BadUrl::Port)),
            ("http://app:70000/", Err(BadUrl::Port)),
            ("http://app:-1/", Err(BadUrl::Port)),
            ("http://app:$(APP_PORT)/hook", Err(BadUrl::Port)),
            ("http://app/hook#b", Err(BadUrl::Fragment)),
            ("http://u:p@app/", Err(BadUrl::Credentials)),
            ("app:3000", Err(BadUrl::NotAUrl)),
            ("/hook", Err(BadUrl::NotAUrl)),
            ("", Err(BadUrl::NotAUrl)),
        ] {
            assert_eq!(parse(text).map(|(_, port)| port), wanted, "{text}");
        }
        assert!(matches!(parse("http:///hook"), Err(BadUrl::NotAUrl | BadUrl::NoHost)));
    }
}
