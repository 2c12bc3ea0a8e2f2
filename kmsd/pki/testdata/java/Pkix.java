import java.io.*;
import java.nio.file.*;
import java.security.MessageDigest;
import java.security.cert.*;
import java.security.cert.Certificate;
import java.time.Instant;
import java.util.*;

/**
 * The other side of the tests of certificates: the JDK's own PKIX and PKCS#7, without a library. It carries out the commands
 * on standard input, one per line, and writes one line for each:
 *
 * validate NAME TIME ANCHORS CHAIN CRLS   PKIX with revocation on; CRLS may be "-", then revocation is off
 * build NAME TIME ANCHORS LEAF OTHERS     builds a path itself, revocation off
 * read NAME FILE                          lists the certificates of a PKCS#7 file
 * write NAME PEMFILE OUT                  writes the certificates as PKCS#7
 */
public class Pkix {
    static final CertificateFactory factory;

    static {
        try {
            factory = CertificateFactory.getInstance("X.509");
        } catch (CertificateException e) {
            throw new RuntimeException(e);
        }
    }

    public static void main(String[] args) throws Exception {
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = in.readLine()) != null; ) {
            String[] word = line.split(" ");
            String answer;
            try {
                answer = run(word);
            } catch (CertPathValidatorException e) {
                answer = "refused " + e.getReason();
            } catch (CertPathBuilderException e) {
                answer = "refused no path";
            } catch (Exception e) {
                answer = "error " + e;
            }
            System.out.println(word[1] + " " + answer.replace('\n', ' '));
        }
    }

    static String run(String[] word) throws Exception {
        switch (word[0]) {
            case "validate": {
                PKIXParameters p = new PKIXParameters(anchors(word[3]));
                p.setDate(Date.from(Instant.parse(word[2])));
                p.setRevocationEnabled(!word[5].equals("-"));
                if (!word[5].equals("-")) {
                    try (InputStream f = Files.newInputStream(Path.of(word[5]))) {
                        p.addCertStore(CertStore.getInstance("Collection", new CollectionCertStoreParameters(factory.generateCRLs(f))));
                    }
                    PKIXRevocationChecker checker = (PKIXRevocationChecker) CertPathValidator.getInstance("PKIX").getRevocationChecker();
                    checker.setOptions(EnumSet.of(PKIXRevocationChecker.Option.PREFER_CRLS, PKIXRevocationChecker.Option.NO_FALLBACK));
                    p.addCertPathChecker(checker);
                }
                CertPathValidator.getInstance("PKIX").validate(factory.generateCertPath(certificates(word[4])), p);
                return "ok";
            }
            case "build": {
                X509CertSelector target = new X509CertSelector();
                X509Certificate leaf = certificates(word[4]).get(0);
                target.setCertificate(leaf);
                PKIXBuilderParameters p = new PKIXBuilderParameters(anchors(word[3]), target);
                p.setDate(Date.from(Instant.parse(word[2])));
                p.setRevocationEnabled(false);
                List<X509Certificate> others = new ArrayList<>(certificates(word[5]));
                others.add(leaf);
                p.addCertStore(CertStore.getInstance("Collection", new CollectionCertStoreParameters(others)));
                return "ok " + CertPathBuilder.getInstance("PKIX").build(p).getCertPath().getCertificates().size();
            }
            case "read": {
                List<String> list = new ArrayList<>();
                try (InputStream f = Files.newInputStream(Path.of(word[2]))) {
                    for (Certificate c : factory.generateCertificates(f)) {
                        list.add(digest(c));
                    }
                }
                try (InputStream f = Files.newInputStream(Path.of(word[2]))) {
                    return String.join(",", list) + " " + factory.generateCertPath(f, "PKCS7").getCertificates().size();
                }
            }
            case "write":
                Files.write(Path.of(word[3]), factory.generateCertPath(certificates(word[2])).getEncoded("PKCS7"));
                return "ok";
        }
        return "error unknown command";
    }

    static List<X509Certificate> certificates(String file) throws Exception {
        List<X509Certificate> list = new ArrayList<>();
        try (InputStream f = Files.newInputStream(Path.of(file))) {
            for (Certificate c : factory.generateCertificates(f)) {
                list.add((X509Certificate) c);
            }
        }
        return list;
    }

    static Set<TrustAnchor> anchors(String file) throws Exception {
        Set<TrustAnchor> set = new HashSet<>();
        for (X509Certificate c : certificates(file)) {
            set.add(new TrustAnchor(c, null));
        }
        return set;
    }

    static String digest(Certificate c) throws Exception {
        return String.format("%064x", new java.math.BigInteger(1, MessageDigest.getInstance("SHA-256").digest(c.getEncoded())));
    }
}
